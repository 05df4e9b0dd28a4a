"""Linear quantizers against published values and their rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_nn.quantizers import LinearActivationQuantizer, LinearWeightQuantizer
from elastic_nn.quantizers.functional import (
    highest_code,
    kl_clip,
    quantize_activation,
    quantize_weight,
)


def test_published_activations_and_gradients(golden):
    data, arrays = golden("linear_quantizer.json"), golden("linear_quantizer.npz")
    cases = [case for case in data["cases"] if case["kind"] == "activation"]
    assert cases
    for case in cases:
        x = torch.tensor(arrays["x"], requires_grad=True)
        clip = torch.tensor([case["activation_range"]], requires_grad=True)
        learned = case["trainable_range"]
        y = quantize_activation(x, clip, case["a_bit"], signed=not case["half_wave"], learn_clip=learned)
        y.backward(torch.tensor(arrays["grad_out_x"]))
        np.testing.assert_allclose(y.detach(), arrays[f"{case['key']}_y"], atol=1e-6)
        expected = arrays[f"{case['key']}_mask"] / 2 * arrays["grad_out_x"]
        np.testing.assert_allclose(x.grad, expected, atol=1e-6)
        if learned:
            assert clip.grad.item() == pytest.approx(case["grad_activation_range"], abs=1e-4)
        else:
            assert clip.grad is None


def squash_weight(w):
    """DoReFa's bounded weights, tanh(w) / max|tanh(w)|, to be quantized with a clip of 1 (arXiv 1606.06160)."""
    squashed = torch.tanh(w)
    return squashed / squashed.abs().max()


def test_published_weights_and_gradients(golden):
    data, arrays = golden("linear_quantizer.json"), golden("linear_quantizer.npz")
    for case in (case for case in data["cases"] if case["kind"] == "weight"):
        w = torch.tensor(arrays["w"], requires_grad=True)
        source = squash_weight(w) if case["mode"] == "tanh" else w
        before = case["weight_range_before"]
        clip = torch.tensor([before]) if before > 0 else w.detach().abs().max()
        y = quantize_weight(source, clip, case["w_bit"])
        y.backward(torch.tensor(arrays["grad_out_w"]))
        np.testing.assert_allclose(y.detach(), arrays[f"{case['key']}_y"], atol=1e-6)
        np.testing.assert_allclose(w.grad, arrays.get(f"{case['key']}_grad", arrays["grad_out_w"]), atol=1e-5)


def clip_by_a_loop(magnitude, bits):
    """The definition of `kl_clip`, one candidate after another, with numpy's interpolation."""
    counts, edges = np.histogram(magnitude, bins="sqrt", range=(0.0, magnitude.max()))
    cumulative, n_codes = np.cumsum(counts) / counts.sum(), 2 ** (bits - 1)
    least, best = np.inf, magnitude.max()
    for kept in range(n_codes + 1, len(counts) + 1):
        clipped = np.r_[cumulative[: kept - 1], np.ones(len(counts) - kept + 1)]
        coarse = np.interp(np.linspace(0, kept - 1, n_codes), np.arange(kept), clipped[:kept])
        quantized = np.r_[np.interp(np.linspace(0, n_codes - 1, kept), np.arange(n_codes), coarse), clipped[kept:]]
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.nansum((cumulative - quantized) * np.log2(cumulative / quantized))
        if divergence < least:
            least, best = divergence, (kept + 0.5) * (edges[1] - edges[0])
    return best


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.integers(1, 5), st.sampled_from((1.0, 0.3, 0.0)))
@settings(max_examples=40)
def test_clips_of_least_divergence_are_those_of_a_loop(seed, n, bits, share):
    """To the last bit. `share` of the values is spread, the rest is near the largest."""
    rng = np.random.default_rng(seed)
    magnitude = np.where(rng.random(n) < share, np.abs(rng.standard_t(3, n)), rng.uniform(0.9, 1.0, n))
    for values in (magnitude, magnitude.astype(np.float32)):
        assert kl_clip(values, bits) == clip_by_a_loop(values, bits)


def test_published_thresholds_and_calibration(golden):
    data, arrays = golden("linear_quantizer.json"), golden("linear_quantizer.npz")
    for case in data["compute_threshold"]:
        assert kl_clip(arrays[case["array"]], case["bits"]) == pytest.approx(case["threshold"], rel=1e-5)
    for case in data["calibrate"]:
        sample = torch.tensor(arrays[case["array"]])
        act = LinearActivationQuantizer(signed=not case["half_wave"], published=True)
        act.bits = case["bits"]
        act.calibrate(sample)
        assert act.range.item() == pytest.approx(case["activation_range_after"], rel=1e-5)
        weight = LinearWeightQuantizer()
        weight.bits = case["bits"]
        weight.calibrate(sample)
        stored = weight.range.item() if weight.calibrated else sample.abs().max().item()
        assert stored == pytest.approx(case["weight_range_after"], rel=1e-5)


@settings(max_examples=50)
@given(st.integers(2, 8), st.booleans(), st.floats(0.1, 8), st.integers(0, 1000))
def test_activation_codes_are_few_and_close(bits, signed, clip, seed):
    x = 4 * torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = quantize_activation(x, torch.tensor([clip], dtype=torch.float64), bits, signed=signed)
    step = clip / highest_code(bits, signed=signed)
    clipped = x.clamp(-clip if signed else 0.0, clip)
    assert (y - clipped).abs().max() <= step / 2 + 1e-9
    assert len((y / step).round().unique()) <= 2**bits


def test_gradients_match_the_formula_that_the_papers_write():
    """0.5 (|x| - |x - r| + r) with a straight-through round, differentiated by autograd."""
    x = torch.linspace(-3, 9, 41, dtype=torch.float64)
    for signed in (False, True):
        ours, theirs = (x.clone().requires_grad_(True) for _ in range(2))
        r1, r2 = (torch.tensor([6.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
        weights = torch.arange(41, dtype=torch.float64)
        (quantize_activation(ours, r1, 4, signed=signed) * weights).sum().backward()
        low = (-theirs - r2).abs() if signed else theirs.abs()
        clipped = 0.5 * (low - (theirs - r2).abs()) + (0 if signed else 0.5 * r2)
        (clipped * weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(r1.grad, r2.grad)


def test_disabled_passes_through_and_zero_filters_stay_zero():
    x = torch.randn(8)
    for quantizer in (LinearActivationQuantizer(signed=True), LinearWeightQuantizer()):
        quantizer.enabled = False
        assert quantizer(x) is x
    assert torch.equal(LinearWeightQuantizer()(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_weight_quantizer_remembers_nothing():
    quantizer = LinearWeightQuantizer()
    small = quantizer(torch.tensor([0.1, -0.05]))
    quantizer(torch.tensor([10.0, -3.0]))
    assert torch.equal(quantizer(torch.tensor([0.1, -0.05])), small)
