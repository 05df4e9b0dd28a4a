"""Properties of all quantizers: codes and scales, calibration that adds up, contexts that restore attributes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apq.errors import UserError
from apq.policy import QUANTIZERS, SUPERNET_QUANTIZERS
from apq.space import FULL_PRECISION
from elastic_nn.modules.quant_layers import (
    QuantLinear,
    collecting,
    learned_parameters,
    part_of_batch,
    quantizers,
    quantizers_off,
    shared_batch,
)
from elastic_nn.networks.quantize_model import quantize_model
from elastic_nn.quantizers import (
    BATCHQUANT,
    FLOAT,
    KMEANS,
    LINEAR,
    LSQ,
    SCHEMES,
    BatchQuantizer,
    KMeansWeightQuantizer,
    LinearActivationQuantizer,
    LinearWeightQuantizer,
    LsqQuantizer,
    NoQuantizer,
    PerBits,
)
from elastic_nn.quantizers.functional import kl_clip
from elastic_nn.quantizers.lsq import initial_step
from elastic_nn.quantizers.range_estimators import channel_range
from elastic_nn.training.calibration import calibrate_ranges, calibration_table

AFFINE = {
    "linear activation": LinearActivationQuantizer,
    "linear weight": lambda signed: LinearWeightQuantizer(),
    "lsq": LsqQuantizer,
    "batchquant": BatchQuantizer,
    "per bits": lambda signed: PerBits(lambda: LsqQuantizer(signed), choices=range(1, 9)),
}


def drawn(seed, signed, scale=1.0):
    x = scale * torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return x if signed else x.relu()


@settings(max_examples=40)
@given(st.sampled_from(sorted(AFFINE)), st.integers(2, 8), st.booleans(), st.floats(0.1, 3), st.integers(0, 1000))
def test_codes_and_scale_rebuild_what_is_quantized(name, bits, signed, scale, seed):
    quantizer = AFFINE[name](signed).eval()
    quantizer.bits = bits
    x = drawn(seed, signed, scale)
    quantizer.calibrate(drawn(seed + 1, signed, scale))
    with torch.no_grad():
        for part in quantizer.modules():
            if isinstance(part, BatchQuantizer):
                part.scale.fill_(0.3)
                part.offset.fill_(-0.4)
            if isinstance(part, LsqQuantizer):
                part.step.mul_(-1 if seed % 2 else 1)  # only its magnitude counts
        y = quantizer(x)
    step, zero_point = quantizer.scale_and_zero_point(x)
    low, high = quantizer.code_range
    codes = y / step + zero_point
    whole = codes.round()
    torch.testing.assert_close(codes, whole, atol=1e-3, rtol=0)
    assert low <= whole.min() <= whole.max() <= high
    torch.testing.assert_close(step * (whole - zero_point), y, atol=1e-5 * scale, rtol=1e-5)
    # And from x itself: its codes are the nearest ones in the range.
    nearest = (x / step + zero_point).clamp(low, high).round()
    rebuilt = step * (nearest - zero_point)
    assert (rebuilt - y).abs().max() <= step * 1.001  # a value on an edge between two codes may round the other way
    assert ((rebuilt - y).abs() > 1e-4 * step).float().mean() < 0.02


def test_a_single_signed_bit_is_a_sign():
    quantizer = LsqQuantizer(signed=True)
    quantizer.bits = 1
    w = torch.tensor([-3.0, -0.1, 0.0, 0.2, 5.0])
    quantizer.calibrate(w)
    step, zero_point = quantizer.scale_and_zero_point()
    assert quantizer.code_range == (-1, 1)
    assert torch.equal(quantizer(w), step * (torch.tensor([-1.0, -1, 0, 1, 1]) - zero_point))


def test_ranges_that_follow_the_values_need_them():
    w = torch.tensor([1.0, -2.54])
    linear = LinearWeightQuantizer()
    with pytest.raises(UserError, match="follows its weights"):
        linear.scale_and_zero_point()
    assert linear.scale_and_zero_point(w)[0].item() == pytest.approx(2.54 / 127)
    linear.bits = 4
    linear.calibrate(w)
    assert linear.scale_and_zero_point()[0].item() == pytest.approx(linear.range.item() / 7)
    with pytest.raises(UserError, match="not set"):
        LsqQuantizer(signed=True).scale_and_zero_point()
    with pytest.raises(UserError, match="no statistics"):
        BatchQuantizer(signed=True).scale_and_zero_point()
    for quantizer in (KMeansWeightQuantizer(), NoQuantizer()):
        with pytest.raises(UserError, match="scale"):
            quantizer.scale_and_zero_point(w)


@pytest.mark.parametrize("bits", [3, 8])
def test_calibration_covers_all_calls(bits):
    small, large = drawn(0, True, 0.2), drawn(1, True, 1.5)

    def calibrated(make, *values):
        quantizer = make()
        quantizer.bits = bits
        quantizer.calibrate(drawn(2, True))
        quantizer.forget()
        for v in values:
            quantizer.calibrate(v)
        return quantizer

    for make in (lambda: LinearActivationQuantizer(signed=True), LinearWeightQuantizer):
        alone = calibrated(make, large).range.item()
        assert calibrated(make, small).range.item() <= alone
        assert calibrated(make, small, large).range.item() == calibrated(make, large, small).range.item() == alone
    parts = large[:2], large[2:]
    for make in (lambda: LsqQuantizer(signed=True), lambda: PerBits(lambda: LsqQuantizer(signed=True))):
        found = calibrated(make, *parts).scale_and_zero_point()[0]
        torch.testing.assert_close(found, initial_step(large, bits, signed=True))  # means weighted by values: of all
    averaged = calibrated(lambda: BatchQuantizer(signed=True), *parts)
    ends = [calibrated(lambda: BatchQuantizer(signed=True), part) for part in parts]
    assert averaged.high.item() == pytest.approx((2 * ends[0].high.item() + 4 * ends[1].high.item()) / 6)
    assert averaged.seen.item() == 6


class Twice(nn.Module):
    """One layer that runs twice on different inputs."""

    def __init__(self, gain):
        super().__init__()
        self.first, self.shared, self.gain = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), gain

    def forward(self, x):
        return self.shared(self.gain * self.shared(x + 0 * self.first(x)))


@pytest.mark.parametrize("gain", [0.1, 10.0])
def test_a_layer_that_runs_twice_gets_the_range_of_its_larger_input(gain):
    torch.manual_seed(0)
    net, x = Twice(gain), torch.rand(8, 4)
    inputs = [x, gain * net.shared(x)]
    quantize_model(net, ["first", "shared"], LINEAR, {"first": True, "shared": True})
    largest = max(value.abs().max().item() for value in inputs)
    expected = largest
    for _ in range(2):  # the second pass forgets the first
        calibrate_ranges(net, x)
        assert net.shared.act_quant.range.item() == pytest.approx(expected)
    table = calibration_table(net, x, [2, 8])
    assert table["shared", "act_quant", 8]["range"].item() == net.shared.act_quant.range.item()
    assert ("first", "act_quant", 8) not in table
    assert net.shared.act_quant.bits == 8
    calibrate_ranges(net, x / 100)
    assert net.shared.act_quant.range.item() < expected


def by_hand(name, part, bits, calls):
    """The calibrated values of an activation quantizer for the inputs of all calls, from their definitions."""
    values = torch.cat([v.flatten() for v in calls]).abs()
    if name.startswith("linear"):
        magnitude = bits - part.signed  # one bit is the sign
        few = [min(v.abs().max().item(), kl_clip(v.numpy(), magnitude)) for v in calls]
        largest = values.max().item() if magnitude >= 5 else max(few)
        return {"range": min(largest, 6.0) if name == "linear-published" else largest}
    if name.startswith("lsq"):
        highest = 2 ** (bits - part.signed) - 1
        return {"step": 2 * values.mean().item() / highest**0.5}
    ranges = [part.estimate(v, bits) for v in calls]  # as many images in every call
    low, high = (sum(edge.mean().item() for edge in edges) / len(calls) for edges in zip(*ranges, strict=True))
    if part.estimate is channel_range:
        assert low == pytest.approx(np.mean([v.numpy().min(axis=0).mean() for v in calls]), rel=1e-5)
        assert high == pytest.approx(np.mean([v.numpy().max(axis=0).mean() for v in calls]), rel=1e-5)
    return {"low": low, "high": high}


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", sorted(set(SCHEMES) - {"float"}))
def test_every_quantizer_of_a_layer_that_runs_twice_sees_both_runs(name, bits):
    torch.manual_seed(0)
    net, x = Twice(0.1), torch.rand(8, 4)
    with torch.no_grad():
        calls = [x, 0.1 * net.shared(x)]
    weight = net.shared.weight.detach().clone()
    quantize_model(net, ["first", "shared"], SCHEMES[name], {"first": True, "shared": True})
    net.shared.set_bits(bits, bits)
    table = calibration_table(net, x, [bits])
    for _ in range(2):  # a second pass does not add to the first
        calibrate_ranges(net, x)
    for kind, operand in net.shared.operands().items():
        part = operand.of_bits[str(bits)] if isinstance(operand, PerBits) else operand
        prefix = f"of_bits.{bits}." if isinstance(operand, PerBits) else ""
        found = [part.state_dict(), {k.removeprefix(prefix): v for k, v in table["shared", kind, bits].items()}]
        if kind == "act_quant":
            expected = by_hand(name, part, bits, calls)
            for state in found:
                assert {key: state[key].item() for key in expected} == pytest.approx(expected, rel=1e-5)
            continue
        once = SCHEMES[name].weight()  # the weights of both runs are the same
        once.bits = bits
        once.calibrate(weight)
        for state in found:
            alone = {k.removeprefix(prefix): v for k, v in once.state_dict().items() if k.startswith(prefix)}
            assert all(torch.allclose(state[key], value, rtol=1e-6) for key, value in alone.items())


def test_full_precision_passes_every_tensor():
    x = torch.randn(4, 3)
    for scheme in SCHEMES.values():
        for quantizer in (scheme.weight(), scheme.activation(True)):
            quantizer.bits = FULL_PRECISION
            assert quantizer(x) is x
    quantizer = NoQuantizer()
    quantizer.bits = 4
    assert quantizer.bits == FULL_PRECISION
    assert not quantizer.state_dict()


def test_what_is_learned():
    layers = {scheme.name: QuantLinear(3, 2, scheme) for scheme in (FLOAT, LINEAR, KMEANS, LSQ, BATCHQUANT)}
    found = {
        name: {
            key.rpartition(".")[2]
            for key, p in layer.named_parameters()
            if any(p is q for q in learned_parameters(layer))
        }
        for name, layer in layers.items()
    }
    assert found == {
        "float": set(),
        "linear": {"range"},
        "kmeans": set(),  # centroids are weights
        "lsq": {"step"},
        "batchquant": {"step", "scale", "offset"},
    }
    assert len(learned_parameters(layers["batchquant"])) == len(
        {id(p) for p in learned_parameters(layers["batchquant"])}
    )


def interrupted(context, look):
    """Values inside a context that ends by an exception."""
    try:
        with context:
            inside = look()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return inside


def test_contexts_restore_what_they_found():
    net = nn.Sequential(QuantLinear(3, 2, BATCHQUANT), QuantLinear(2, 2, LSQ))
    all_of_them = [part for part in net.modules() if hasattr(part, "share")]
    net[0].act_quant.enabled = False

    def state():
        return [(part.enabled, part.synchronised, part.share) for part in all_of_them]

    before = state()
    contexts = (quantizers_off(net), shared_batch(net, 2), part_of_batch(net, 0.5), collecting(net))
    for context in contexts:
        inside = interrupted(context, state)
        assert (inside == before) == (context is contexts[-1])
        assert state() == before
    with part_of_batch(net, 0.5):
        assert {part.share for part in net[1].act_quant.modules()} == {0.5}
        assert net[1].weight_quant.share == 1  # weights are whole in every pass
    with pytest.raises(UserError, match="no statistics"):
        net[0].act_quant.of_bits["8"].eval()(torch.rand(2, 3))  # it collected nothing, and collects no more


def test_names_without_torch_are_those_of_the_schemes():
    assert set(SUPERNET_QUANTIZERS) == {name for name, scheme in SCHEMES.items() if scheme.trains_supernets}
    assert set(QUANTIZERS) <= set(SCHEMES)
    assert [scheme.name for scheme in SCHEMES.values()] == list(SCHEMES)
    assert quantizers(QuantLinear(3, 2, FLOAT)) == []


WHOLE = {  # kinds for which two calls are as one, and the bits from which on they are
    "linear activation": (lambda: LinearActivationQuantizer(signed=False), 5),
    "signed linear activation": (lambda: LinearActivationQuantizer(signed=True), 6),  # one bit is the sign
    "linear weight": (LinearWeightQuantizer, 5),
    "lsq": (lambda: LsqQuantizer(signed=True), 1),
    "lsq per bits": (lambda: PerBits(lambda: LsqQuantizer(signed=True), choices=range(1, 9)), 1),
}
COVERING = {  # the others; k-means has a test of its own
    "linear activation": lambda: LinearActivationQuantizer(signed=False),
    "signed linear activation": lambda: LinearActivationQuantizer(signed=True),
    "linear weight": LinearWeightQuantizer,
    "batchquant": lambda: BatchQuantizer(signed=True),
}


def calibrated_on(make, bits, *values):
    quantizer = make().eval()
    quantizer.bits = bits
    for v in values:
        quantizer.calibrate(v)
    return quantizer


@settings(max_examples=60)
@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 7), st.integers(1, 5), st.floats(0.1, 5), st.integers(0, 1000))
def test_two_calls_of_calibrate_are_as_one_with_all_values(name, more_bits, n, scale, seed):
    make, fewest = WHOLE[name]
    bits, whole = min(fewest + more_bits, 8), drawn(seed, True)
    whole[:n] *= scale
    once, twice = calibrated_on(make, bits, whole), calibrated_on(make, bits, whole[:n], whole[n:])
    torch.testing.assert_close(twice.scale_and_zero_point(whole), once.scale_and_zero_point(whole), rtol=1e-6, atol=0)
    if "lsq" not in name:
        assert torch.equal(twice(whole), once(whole))


@settings(max_examples=60)
@given(st.sampled_from(sorted(COVERING)), st.integers(2, 4), st.floats(1.1, 5), st.booleans(), st.integers(0, 1000))
def test_two_calls_of_calibrate_count_both(name, bits, scale, swapped, seed):
    first, second = drawn(seed, True, 0.5), drawn(seed + 1, True, 0.5 * scale)
    if swapped:
        first, second = second, first
    make = COVERING[name]
    both, ends = calibrated_on(make, bits, first, second), [calibrated_on(make, bits, v) for v in (first, second)]
    if name == "batchquant":  # as many images in both
        assert both.high.item() == pytest.approx(sum(end.high.item() for end in ends) / 2)
        assert both.low.item() == pytest.approx(sum(end.low.item() for end in ends) / 2)
    else:
        assert both.range.item() == max(end.range.item() for end in ends)


def test_the_last_call_of_kmeans_counts():
    first, second = torch.randn(4, 3), torch.randn(5, 3)
    last, alone = (
        calibrated_on(KMeansWeightQuantizer, 2, first, second),
        calibrated_on(KMeansWeightQuantizer, 2, second),
    )
    assert torch.equal(last(second), alone(second))


@pytest.mark.parametrize("name", [*WHOLE, "few bits", "batchquant", "k-means"])
def test_calibration_starts_anew_after_loading(name):
    make, bits = WHOLE.get(name, (LinearWeightQuantizer, 2))
    make = {"batchquant": lambda: BatchQuantizer(signed=True), "k-means": KMeansWeightQuantizer}.get(name, make)
    large, small = drawn(0, True, 2.0), drawn(1, True, 0.2)
    kept = calibrated_on(make, bits, large)
    expected = calibrated_on(make, bits, small)(small)
    for again in (kept, make().eval()):
        again.bits = bits
        again.load_state_dict(kept.state_dict())
        again.calibrate(small)
        assert torch.equal(again(small), expected)


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("mode", ["training", "evaluation", "collecting"])
def test_batchquant_says_the_scale_that_it_uses(mode, momentum):
    """One condition decides for `quantize` and for `scale_and_zero_point` whether the range is that of the batch."""
    quantizer = BatchQuantizer(signed=True, momentum=momentum)
    quantizer.calibrate(drawn(0, True, 3.0))
    quantizer.bits, x = 4, drawn(1, True, 0.5)
    quantizer.train(mode == "training")
    with collecting(quantizer) if mode == "collecting" else contextlib.nullcontext():
        step, zero_point = quantizer.scale_and_zero_point(x)
        y = quantizer(x)
    assert quantizer.calibrated == (mode != "training" or momentum is not None)
    codes = y / step + zero_point
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    low, high = quantizer.code_range
    nearest = (x / step + zero_point).clamp(low, high).round()
    torch.testing.assert_close(step * (nearest - zero_point), y, atol=1e-5, rtol=1e-5)


def test_evaluation_without_statistics_has_no_scale():
    quantizer, x = BatchQuantizer(signed=True).eval(), drawn(0, True)
    for use in (quantizer, quantizer.scale_and_zero_point):
        with pytest.raises(UserError, match="no statistics"):
            use(x)
