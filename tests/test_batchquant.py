"""BatchQuant against published values, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from apq.space import FULL_PRECISION
from elastic_nn.modules.quant_layers import collecting
from elastic_nn.quantizers import BATCHQUANT, MIXED, BatchQuantizer, PerBits
from elastic_nn.quantizers.affine import affine_of_range, gain_of_scale, quantize_affine
from elastic_nn.quantizers.functional import code_range
from elastic_nn.quantizers.lsq import LsqQuantizer, initial_step, quantize_lsq
from elastic_nn.quantizers.range_estimators import channel_range, least_error_range, percentile_range


def sample_range(x, bits):
    """Each image's lowest and highest value: another published criterion."""
    return x.flatten(1).aminmax(dim=1)


def full_range(x, bits):
    return x.aminmax()


def mean_range(x, bits, estimate=channel_range):
    return tuple(edge.mean() for edge in estimate(x, bits))


def quantizer_of(case):
    quantizer = BatchQuantizer(case["signed"])
    quantizer.bits = case["bits"]
    with torch.no_grad():
        quantizer.scale.fill_(case["scale"])
        quantizer.offset.fill_(case["offset"])
    return quantizer


def test_published_values_and_gradients(golden):
    data, arrays = golden("batchquant.json"), golden("batchquant.npz")
    cases = [case for case in data["cases"] if case["mode"] == "train"]
    assert {case["bits"] for case in cases} == {2, 3, 4, 8}
    for case in cases:
        quantizer, grad = quantizer_of(case), torch.tensor(arrays[f"grad_out_{case['x']}"])
        x = torch.tensor(arrays[case["x"]], requires_grad=True)
        y = quantizer(x)
        y.backward(grad)
        np.testing.assert_allclose(y.detach(), arrays[f"{case['key']}_y"], atol=1e-5)
        np.testing.assert_allclose(x.grad, arrays[f"{case['key']}_gmask"] * grad.numpy(), atol=1e-5)
        assert quantizer.scale.grad.item() == pytest.approx(case["grad_scale"], rel=1e-5, abs=1e-5)
        assert quantizer.offset.grad.item() == pytest.approx(case["grad_offset"], rel=1e-5, abs=1e-5)
        low, high = mean_range(x.detach(), case["bits"])
        assert (low.item(), high.item()) == pytest.approx((case["batch_min"], case["batch_max"]), abs=1e-5)
        step, zero_point = affine_of_range(low, high, case["bits"], signed=case["signed"])
        assert step.item() == pytest.approx(case["observer_scale"], rel=1e-6)
        assert zero_point.item() == case["zero_point"]
        left = (case["running_min_after"], case["running_max_after"], case["num_batches_tracked_after"])
        assert (quantizer.low.item(), quantizer.high.item(), quantizer.seen.item()) == left == (0, 0, 0)


def test_published_scaled_gradients(golden):
    data, arrays = golden("batchquant.json"), golden("batchquant.npz")
    cases = [case for case in data["cases"] if case["mode"] == "train_grad_scale"]
    assert cases
    for case in cases:
        quantizer, x = quantizer_of(case), torch.tensor(arrays[case["x"]])
        bits, signed = case["bits"], case["signed"]
        factor = 1 / math.sqrt(x.numel() * code_range(bits, signed=signed)[1])
        affine = affine_of_range(*mean_range(x, bits), bits, signed=signed)
        gain = gain_of_scale(quantizer.scale)
        y = quantize_affine(x, *affine, gain, quantizer.offset, bits, signed=signed, gradient_factor=factor)
        y.backward(torch.tensor(arrays[f"grad_out_{case['x']}"]))
        assert quantizer.scale.grad.item() == pytest.approx(case["grad_scale"], abs=1e-5)
        assert quantizer.offset.grad.item() == pytest.approx(case["grad_offset"], abs=1e-5)


def test_published_evaluation(golden):
    data, arrays = golden("batchquant.json"), golden("batchquant.npz")
    cases = [case for case in data["cases"] if case["mode"] == "eval"]
    assert {case["running_max"] == 0 for case in cases} == {True, False}
    for case in cases:
        quantizer = quantizer_of(case).eval()
        quantizer.low.fill_(case["running_min"])
        quantizer.high.fill_(case["running_max"])
        step, zero_point = affine_of_range(quantizer.low, quantizer.high, case["bits"], signed=case["signed"])
        assert step.item() == pytest.approx(case["observer_scale"], rel=1e-6)
        assert zero_point.item() == case["zero_point"]
        with pytest.raises(UserError, match=f"a layer has no statistics .* {case['bits']} bits"):
            quantizer(torch.tensor(arrays[case["x"]]))  # the published code would answer with step 1
        quantizer.seen.fill_(1)
        np.testing.assert_allclose(
            quantizer(torch.tensor(arrays[case["x"]])).detach(), arrays[f"{case['key']}_y"], atol=1e-5
        )


def test_published_running_statistics(golden):
    found, arrays = golden("batchquant.json")["running_statistics"], golden("batchquant.npz")
    quantizer = BatchQuantizer(signed=True)
    batches = [torch.tensor(arrays[f"stat_batch{i}"]) for i in range(3)]
    assert [len(batch) for batch in batches] == found["batch_sizes"]
    with collecting(quantizer):
        for batch, edges in zip(batches, found["per_batch_min_max"], strict=True):
            assert [edge.item() for edge in mean_range(batch, 4)] == pytest.approx(edges, abs=1e-5)
            own = BatchQuantizer(signed=True)  # in the pass each batch is quantized with its own statistics
            assert torch.equal(quantizer(batch), own(batch))
    assert quantizer.low.item() == pytest.approx(found["running_min"], abs=1e-5)
    assert quantizer.high.item() == pytest.approx(found["running_max"], abs=1e-5)
    assert quantizer.seen.item() == sum(found["batch_sizes"])


def test_published_criteria(golden):
    data, arrays = golden("batchquant.json"), golden("batchquant.npz")
    criteria = {"mean": channel_range, "bmean": sample_range, "minmax": full_range}
    assert {case["criteria"] for case in data["minmax_criteria"]} == set(criteria)
    for case in data["minmax_criteria"]:
        edges = mean_range(torch.tensor(arrays[case["x"]]), 4, criteria[case["criteria"]])
        assert [edge.item() for edge in edges] == pytest.approx([case["min"], case["max"]], abs=1e-5)


def initial_step_of_spread(v, bits, *, signed):
    """(1,) initial step of weights in LSQ+ (Bhalgat et al. 2020): codes reach three deviations from the mean."""
    deviation, mean = torch.std_mean(v.float())
    furthest = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    return furthest.reshape(1) / (code_range(bits, signed=signed)[1] + 1)


def test_published_weights(golden):
    data, arrays = golden("batchquant.json"), golden("batchquant.npz")
    w = torch.tensor(arrays["lsq_w"])
    rules = {"lsq": initial_step, "lsq+": initial_step_of_spread}
    assert {case["init"] for case in data["lsq_weight_quantizer"]} == set(rules)
    for case in data["lsq_weight_quantizer"]:
        step = rules[case["init"]](w, case["bits"], signed=True)
        assert step.item() == pytest.approx(case["scale"], rel=1e-5)
    weight = BATCHQUANT.weight()  # starts as LSQ does
    for case in [case for case in data["lsq_weight_quantizer"] if case["init"] == "lsq"]:
        step = initial_step(w, case["bits"], signed=True)
        weight.bits = case["bits"]
        np.testing.assert_allclose(weight(w).detach(), arrays[f"lsq_w_y{case['bits']}"], atol=1e-5)
    assert torch.equal(weight(w), quantize_lsq(w, step, case["bits"], signed=True))


@settings(max_examples=40)
@given(st.integers(2, 8), st.booleans(), st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 1000))
def test_gradients_are_those_of_the_plain_formula(bits, signed, scale, offset, seed):
    def plain(x, gain, offset):  # as in the paper, by autograd
        exact = x * gain / step + zero_point + offset
        clipped = exact.clamp(*code_range(bits, signed=signed))
        rounded = clipped + (clipped.round() - clipped).detach()
        return (rounded - zero_point - offset) * step / gain

    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(6, 2, 4, generator=generator, dtype=torch.float64)
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    step, zero_point = affine_of_range(*(0.7 * edge for edge in full_range(x, bits)), bits, signed=signed)
    found = []
    for quantize in (plain, lambda *args: quantize_affine(args[0], step, zero_point, *args[1:], bits, signed=signed)):
        leaves = [t.clone().requires_grad_() for t in (x, torch.tensor([2.0**scale]), torch.tensor([offset]))]
        leaves[1:] = [t.detach().double().requires_grad_() for t in leaves[1:]]
        y = quantize(*leaves)
        y.backward(grad)
        found.append((y, *(leaf.grad for leaf in leaves)))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_zero_is_exact_and_an_empty_range_divides_by_nothing():
    x = torch.rand(4, 3, 5, 5) * torch.linspace(0.3, 2, 3)[:, None, None]
    for values in (x, x - 0.4, -x):
        quantizer = BatchQuantizer(signed=False)
        quantizer.bits = 3
        values[0, 0, 0, 0] = 0
        assert quantizer(values)[0, 0, 0, 0] == 0
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    quantizer(zeros).sum().backward()
    assert not quantizer(zeros).any()
    assert torch.isfinite(quantizer.scale.grad).all()


@pytest.mark.parametrize("estimate", [percentile_range, least_error_range])
def test_robust_estimators_cut_an_outlier_off(estimate):
    x = torch.randn(8, 16, 20, 20, generator=torch.Generator().manual_seed(0))
    x.view(-1)[0] = 40.0  # the first value is always looked at
    low, high = estimate(x, 2)
    assert -6 < low < 0 < high < 30
    assert full_range(x, 2)[1] == 40


@pytest.mark.parametrize("shape", [(64, 32, 32, 32), (64, 48, 16, 16), (1024, 64, 14, 14)])
def test_estimates_look_at_every_place_of_a_map(shape):
    x = torch.zeros(shape)
    x[..., 1:, 1:] = 1.0  # what a border hides
    x[..., 5] = -1.0
    for estimate in (percentile_range, least_error_range):
        assert [edge.item() for edge in estimate(x, 8)] == pytest.approx([-1, 1], abs=0.01)


def test_extremes_do_not_grow_with_the_batch():
    x = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = mean_range(x, 4)
    parts = [mean_range(part, 4) for part in x.split(64)]
    assert [edge.item() for edge in whole] == pytest.approx([sum(p[i].item() for p in parts) / 4 for i in (0, 1)])
    of_part = mean_range(x[:150], 4)
    parts = [mean_range(part, 4) for part in x[:150].tensor_split(2)]
    assert [edge.item() for edge in of_part] == pytest.approx([sum(p[i].item() for p in parts) / 2 for i in (0, 1)])


def test_training_drops_statistics():
    quantizer, x = BatchQuantizer(signed=True), torch.randn(8, 3, 4, 4)
    quantizer.calibrate(x)
    quantizer.eval()(x)
    quantizer.train()(x)
    with pytest.raises(UserError, match="calibrate the network first"):
        quantizer.eval()(x)


def test_half_precision_is_quantized_in_single():
    quantizer, x = BatchQuantizer(signed=True), torch.randn(8, 3, 4, 4)
    quantizer.bits = 4
    half = x.bfloat16().requires_grad_()
    y = quantizer(half)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), quantizer(half.detach().float()), atol=0, rtol=1 / 128)
    y.sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert quantizer.scale.grad.dtype == torch.float32


def test_the_least_error_is_the_least():
    x, bits = torch.randn(2000, generator=torch.Generator().manual_seed(1)), 2

    def error(low, high):
        affine = affine_of_range(low, high, bits, signed=False)
        return (quantize_affine(x, *affine, torch.ones(()), torch.zeros(()), bits, signed=False) - x).square().mean()

    chosen, (low, high) = error(*least_error_range(x, bits)), full_range(x, bits)
    assert chosen < 0.8 * error(low, high)
    assert all(chosen <= error(low * share, high * share) for share in (0.3, 0.5, 0.7, 0.9))


def test_a_running_range_trains_on_its_average():
    quantizer = MIXED["running-minmax"].activation(False)
    quantizer.bits = 4
    part = quantizer.of_bits["4"]
    ones = torch.ones(2, 3, 2, 2)
    quantizer(4 * ones)
    assert part.high.item() == 4
    quantizer(8 * ones)
    assert part.high.item() == pytest.approx(4.4)
    assert quantizer(8 * ones).max().item() == pytest.approx(4.76)  # clipped: the range lags behind
    assert quantizer.eval()(2 * ones).max().item() == pytest.approx(2, abs=4.76 / 30)
    assert part.seen.item() == 6
    quantizer.bits = 3
    with pytest.raises(UserError, match="at 3 bits"):
        quantizer(ones)


def test_statistics_are_saved_and_forgotten():
    quantizer, x = BatchQuantizer(signed=False), torch.rand(3, 2, 4, 4)
    quantizer.eval().calibrate(x)
    expected, state = quantizer(x), quantizer.state_dict()
    loaded = BatchQuantizer(signed=False).eval()
    assert not loaded.calibrated
    loaded.load_state_dict(state)
    assert torch.equal(loaded(x), expected)
    loaded.forget()
    with pytest.raises(UserError, match="calibrate the network first"):
        loaded(x)


def test_each_number_of_bits_learns_its_own():
    quantizer, x = BATCHQUANT.activation(False), torch.rand(4, 3, 5, 5)
    weight, w = BATCHQUANT.weight(), torch.randn(6, 3, 1, 1, requires_grad=True)
    for bits in (2, 3):
        quantizer.bits = weight.bits = bits
        (quantizer(x).sum() + weight(w).square().sum()).backward()
        assert len(quantizer(x).unique()) <= 2**bits
        assert len(weight(w).unique()) <= 2**bits
    with_gradient = {name for part in (quantizer, weight) for name, p in part.named_parameters() if p.grad is not None}
    assert with_gradient == {f"of_bits.{b}.{name}" for b in (2, 3) for name in ("scale", "offset", "step")}
    assert weight.of_bits["2"].step.item() > weight.of_bits["3"].step.item() > 0 == weight.of_bits["4"].step.item()
    quantizer.bits = weight.bits = FULL_PRECISION
    assert quantizer(x) is x
    assert weight(w) is w
    quantizer.bits = 9
    with pytest.raises(UserError, match="no quantizer of 9 bits; there are 2, 3"):
        quantizer(x)


def test_calibration_starts_all_bits():
    weight, w = PerBits(lambda: LsqQuantizer(signed=True), choices=(2, 4)), torch.randn(50)
    weight.calibrate(w)
    for bits in (2, 4):
        assert weight.of_bits[str(bits)].step.item() == pytest.approx(initial_step(w, bits, signed=True).item())
