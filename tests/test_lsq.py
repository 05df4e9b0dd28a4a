"""Learned-step quantization against published values, and inheritance by fewer bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from elastic_nn.quantizers import LSQ, LsqQuantizer
from elastic_nn.quantizers.functional import code_range
from elastic_nn.quantizers.lsq import inherited_step, quantize_lsq


def test_published_values_and_gradients(golden):
    data, arrays = golden("lsq_quantizer.json"), golden("lsq_quantizer.npz")
    cases = [case for case in data["cases"] if "isActivation" in case]
    assert {case["p"] for case in cases} >= {1, 2, 3, 4, 8}
    for case in cases:
        kind = "activation" if case["isActivation"] else "weight"
        v = torch.tensor(arrays[f"v_{kind}"], requires_grad=True)
        step = torch.tensor([case["s"]], requires_grad=True)
        y = quantize_lsq(v, step, case["p"], signed=not case["isActivation"])
        y.backward(torch.tensor(arrays[f"grad_out_{kind}"]))
        np.testing.assert_allclose(y.detach(), arrays[f"{case['key']}_y"], atol=1e-5)
        np.testing.assert_allclose(v.grad, arrays[f"{case['key']}_gv"], atol=1e-5)
        assert step.grad.item() == pytest.approx(case["grad_s_float64"], abs=1e-5)


def test_published_first_calls(golden):
    data, arrays = golden("lsq_quantizer.json"), golden("lsq_quantizer.npz")
    cases = [case for case in data["cases"] if case.get("kind") == "LsqConv_init"]
    assert [case["nbit"] for case in cases] == [2, 3, 4]
    x = torch.tensor(arrays["v_activation"])
    for case in cases:
        w = torch.tensor(arrays[f"{case['key']}_w"])
        act, weight = LSQ.activation(True), LSQ.weight()
        act.bits = weight.bits = case["nbit"]
        y = F.conv2d(act(x), weight(w), padding=1)
        assert act.step.item() == pytest.approx(case["sa"], rel=1e-6)
        assert weight.step.item() == pytest.approx(case["sw"], rel=1e-6)
        np.testing.assert_allclose(y.detach(), arrays[f"{case['key']}_y"], atol=1e-5)


def test_gradients_by_hand():
    v = torch.tensor([-3.0, -0.9, 0.3, 1.0, 5.0], dtype=torch.float64, requires_grad=True)  # codes -2, -2, 1, 1, 1
    step = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    quantize_lsq(v, step, 2, signed=True).sum().backward()
    assert v.grad.tolist() == [0, 1, 1, 0, 0]
    assert step.grad.item() == pytest.approx(-(-2 + (-2 + 1.8) + (1 - 0.6) + 1 + 1) / math.sqrt(5))


@settings(max_examples=60)
@given(st.integers(2, 8), st.booleans(), st.floats(0.01, 2), st.booleans(), st.integers(0, 1000))
def test_fewer_bits_move_no_value_further_than_the_step(bits, signed, size, negative, seed):
    v = 4 * torch.randn(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v[:40] = size * torch.arange(-20, 20) / 2  # ties and edges
    step = torch.tensor([-size if negative else size], dtype=torch.float64)
    bits += signed  # 3 bits to 2 is the last signed pair
    before = quantize_lsq(v, step, bits, signed=signed)
    after = quantize_lsq(v, inherited_step(step, bits, bits - 1), bits - 1, signed=signed)
    moved = (before - after).abs()
    assert moved.max() <= size * (1 + 1e-9)
    assert moved.sum() <= len(v) * size * (1 + 1e-9)
    low, high = code_range(bits, signed=signed)
    assert len((before / size).round().unique()) <= high - low + 1


def test_fewer_bits_inherit_the_step():
    quantizer = LsqQuantizer(signed=True)
    quantizer.load_state_dict({"step": torch.tensor([-0.1])})
    quantizer.inherit(4, 2)
    assert quantizer.step.item() == pytest.approx(-0.4)
    for bits in (3, 0):
        with pytest.raises(UserError, match=f"{bits} bits cannot inherit the step of 2"):
            quantizer.inherit(2, bits)


def test_step_starts_once_and_again_after_loading():
    quantizer, ones = LsqQuantizer(signed=False), torch.ones(10)
    fresh = quantizer.state_dict()["step"].clone()
    quantizer(ones)
    started = quantizer.step.item()
    assert started == pytest.approx(2 / math.sqrt(255))
    quantizer(5 * ones)
    assert quantizer.step.item() == started
    quantizer.load_state_dict({"step": fresh})
    quantizer(5 * ones)
    assert quantizer.step.item() == pytest.approx(5 * started)
    quantizer.enabled = False
    assert quantizer(ones) is ones


def test_what_is_not_started_stays_so_without_gradients():
    quantizer, v = LsqQuantizer(signed=True), torch.randn(50)
    with torch.no_grad():
        y = quantizer(v)
        assert quantizer.step.item() == 0
    assert torch.equal(quantizer(v), y)
    nothing = LsqQuantizer(signed=True)
    zeros = nothing(torch.zeros(4))
    zeros.sum().backward()
    assert not zeros.any()
    assert torch.isfinite(nothing.step.grad).all()


def test_the_step_of_activations_learns_the_same_however_a_batch_is_cut():
    v = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for parts in (1, 3):
        step = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        for part in v.split(12 // parts):
            quantize_lsq(part, step, 4, signed=False, share=1 / parts).pow(2).sum().backward()
        gradients.append(step.grad.item())
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-12)
