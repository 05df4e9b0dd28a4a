"""The fused kernels of quantizers against the pure functions: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from example_spaces import TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, assert_learns_alike, on_kernels, outside_the_interpreter, passes_in_the_interpreter

from elastic_nn.networks import DynamicQuantizedProxylessNASNets
from elastic_nn.quantizers import (
    BATCHQUANT,
    LSQ,
    BatchQuantizer,
    LinearActivationQuantizer,
    LinearWeightQuantizer,
    LsqQuantizer,
    fused,
)
from elastic_nn.quantizers.functional import code_range

MAKERS = {
    "linear": LinearActivationQuantizer,
    "linear-published": lambda signed: LinearActivationQuantizer(signed, published=True),
    "linear-weight": lambda signed: LinearWeightQuantizer(),
    "lsq": LsqQuantizer,
    "batchquant": BatchQuantizer,
}
# In memory without gaps as it comes, or channels last; every second column, so with gaps; expanded; empty
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: x[:, :, :, ::2],
    "first_channels": lambda x: x[:, :2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


def quantizer_of(name, bits, signed, values):
    """A calibrated quantizer whose learned parameters are at no special place."""
    quantizer = MAKERS[name](signed).to(DEVICE)
    quantizer.bits = bits
    quantizer.calibrate(values)
    with torch.no_grad():
        for parameter, change in zip(quantizer.parameters(), (0.8, -0.3), strict=False):
            parameter.mul_(change).sub_(0.11)
    return quantizer


def both_ways(quantizer, x, grad):
    """Values, gradient of x and of what is learned: by the kernels in the type of x, and as defined in float32."""
    found = []
    for on, dtype in ((True, x.dtype), (False, torch.float32)):
        own, v = copy.deepcopy(quantizer), x.detach().to(dtype).requires_grad_()
        with fused.switched(on):
            assert fused.runs_on(v) is on
            y = own(v)
        y.backward(grad.to(dtype))
        found.append((y, v.grad, [parameter.grad for parameter in own.parameters()]))
    return found


def assert_same(quantizer, x, grad):
    (y, x_grad, learned), (y_ref, x_grad_ref, learned_ref) = both_ways(quantizer, x, grad)
    assert y.dtype == x_grad.dtype == x.dtype
    assert torch.equal(y, y_ref.to(x.dtype))
    assert torch.equal(x_grad, x_grad_ref.to(x.dtype))
    for mine, theirs in zip(learned, learned_ref, strict=True):
        assert mine.shape == theirs.shape
        atol = 1e-6 * grad.abs().sum().item()  # terms of both signs
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=atol)


@on_kernels
@settings(max_examples=25)
@given(
    st.sampled_from(sorted(MAKERS)),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 30), st.integers(1, 40)),
    st.integers(0, 2**20),
)
@example("lsq", 1, True, "contiguous", torch.float32, (1, 3, 1, 1), 0)
@example("batchquant", 8, False, "channels_last", torch.bfloat16, (3, 3, 29, 37), 1)
def test_kernels_give_the_values_and_gradients_of_the_pure_functions(name, bits, signed, layout, dtype, shape, seed):
    if name.startswith("linear") and bits == 1 and (signed or name == "linear-weight"):
        return  # one bit with a sign: the code 0 alone, so there is no step
    draw = torch.Generator().manual_seed(seed)
    x = LAYOUTS[layout](1.7 * torch.randn(shape, generator=draw)).to(DEVICE, dtype)
    x = LAYOUTS["channels_last"](x) if layout == "channels_last" else x
    quantizer = quantizer_of(name, bits, signed, x.float())
    assert_same(quantizer, x, torch.randn(x.shape, generator=draw).to(x))


@on_kernels
@pytest.mark.parametrize("name", ["linear", "lsq", "batchquant"])
def test_more_blocks_than_programs(name, monkeypatch):
    """Each program goes over several blocks; the last one is not full."""
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    x = torch.randn(7 * fused.BLOCK + 777, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_same(quantizer_of(name, 4, True, x), x, torch.linspace(-1, 2, len(x), device=DEVICE))


@on_kernels
@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("signed", [False, True])
def test_edges_and_halves(name, signed):
    """Values on codes, halfway between codes, on the edges of the range and beyond; zeros and NaN."""
    quantizer = quantizer_of(name, 3, signed, torch.tensor([-2.0, 1.0, 3.0], device=DEVICE))
    if name == "batchquant":
        quantizer.eval()
    low, high = code_range(4, signed=True)
    step = quantizer.scale_and_zero_point(torch.ones(1, device=DEVICE))[0].item()
    x = torch.cat([torch.arange(low, high + 1), torch.arange(low, high + 1) + 0.5]).to(DEVICE) * step
    if name == "linear-weight":
        x[:1] = quantizer.range.abs()
    grad = torch.linspace(-1, 2, len(x), device=DEVICE)
    assert_same(quantizer, x, grad)
    if name != "linear-weight":  # whose clip would be NaN
        x[3] = torch.nan
        y = both_ways(quantizer, x, grad)[0][0]
        assert y.isnan().nonzero().tolist() == [[3]]


@on_kernels
@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_passes_as_in_torch(name, value):
    """One NaN among weights is in their largest magnitude, so that it shows in all of them."""
    x = torch.linspace(-2, 3, 40, device=DEVICE)
    quantizer = quantizer_of(name, 4, True, x).eval()  # of BatchQuant: at the range that it has
    x[7] = value
    (y, x_grad, _), (y_ref, x_grad_ref, _) = both_ways(quantizer, x, torch.linspace(-1, 2, 40, device=DEVICE))
    torch.testing.assert_close(y, y_ref, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x_grad, x_grad_ref, rtol=0, atol=0, equal_nan=True)


@on_kernels
@pytest.mark.parametrize("name", ["linear", "lsq", "batchquant"])
def test_empty_tensors(name):
    quantizer = quantizer_of(name, 4, False, torch.ones(3, device=DEVICE))
    x = torch.zeros(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    with fused.switched(True):
        y = quantizer.eval()(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


@on_kernels
def test_zero_and_negative_steps_and_clips():
    """A step of 0 can grow, the sign of a step or clip does not count, and a clip of 0 can return."""
    x, grad = torch.tensor([-0.7, 0.0, 0.4, 3.0], device=DEVICE), torch.tensor([1.0, -2.0, 3.0, 0.5], device=DEVICE)
    for name, value in [(name, value) for name in ("lsq", "linear", "linear-published") for value in (0.0, -0.3)]:
        quantizer = quantizer_of(name, 4, True, x)
        with torch.no_grad():
            next(quantizer.parameters()).fill_(value)
        quantizer._started = True  # of LSQ: a step of 0 that training reached
        assert_same(quantizer, x, grad)


@on_kernels
@pytest.mark.parametrize("name", ["linear-weight", "lsq"])
def test_float32_weights_become_what_autocast_would_make_of_them(name):
    w = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    quantizer = quantizer_of(name, 4, True, w)
    v = w.clone().requires_grad_()
    with fused.switched(True), torch.autocast(DEVICE.type, torch.bfloat16):
        y = quantizer(v)
    with fused.switched(False):
        expected = quantizer(w)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
    y.backward(torch.ones_like(y))
    assert v.grad.dtype == torch.float32


@on_kernels
@pytest.mark.parametrize("scheme", [None, LSQ, BATCHQUANT], ids=["linear", "lsq", "batchquant"])
def test_a_supernet_by_kernels(scheme):
    """Logits and gradients of a whole quantized network, which passes through every quantizer."""
    torch.manual_seed(0)
    kind = {} if scheme is None else {"scheme": scheme}
    net = DynamicQuantizedProxylessNASNets(space=TINY, **kind).to(DEVICE)
    x = torch.randn(4, TINY.in_channels, 8, 8, device=DEVICE)
    assert_learns_alike(net, x, fused.switched)


@on_kernels
@pytest.mark.parametrize("kernel", ["affine_of_range", "activation_gradient", "largest_magnitude"])
def test_where_one_kernel_fails_the_pure_functions_compute(kernel, monkeypatch):
    """Also in inference, where the first tensor may come."""
    from elastic_nn.quantizers import triton_kernels

    class Fails:
        def __getitem__(self, grid):
            raise RuntimeError("ptxas: no such thing")

    monkeypatch.setattr(triton_kernels, kernel, Fails())
    monkeypatch.setattr(fused, "_works", fused._works.__wrapped__)
    x = torch.randn(5, device=DEVICE)
    with (
        torch.inference_mode(),
        pytest.warns(UserWarning, match="quantizers take .* Triton fails: RuntimeError: ptxas"),
    ):
        assert not fused.runs_on(x)
    monkeypatch.undo()
    with torch.inference_mode():
        assert fused._works.__wrapped__(DEVICE)


@outside_the_interpreter
def test_the_interpreter_runs_the_tests_above():
    passes_in_the_interpreter(__file__)


FLOATS, COUNTS = {"smallest", "top", "low", "high", "first", "last", "root"}, {"n", "count"}
CONSTANTS = {"SIGNED": True, "MAGNITUDE": True, "SIGN_ONLY": False, "BLOCK": fused.BLOCK}
FORWARD = ("quantize_activation", "quantize_weight", "quantize_lsq", "quantize_affine")


@outside_the_interpreter
@pytest.mark.parametrize("name", [*FORWARD, "activation_gradient", "lsq_gradient", "affine_gradient"])
def test_kernels_compile_to_exact_operations(name, tmp_path, monkeypatch):
    """For a GPU of compute capability 8.0, also where there is none: divisions and conversions round to nearest."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from elastic_nn.quantizers import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    half = {"x", "v", "grad", "out"}
    types = {
        arg: "constexpr" if arg in CONSTANTS else "fp32" if arg in FLOATS else "i32" if arg in COUNTS
        else "*bf16" if arg in half else "*fp32"
        for arg in kernel.arg_names
    }  # fmt: skip
    constants = {arg: CONSTANTS[arg] for arg in kernel.arg_names if arg in CONSTANTS}
    options = {"num_warps": fused.WARPS}
    target = GPUTarget("cuda", 80, 32)
    code = triton.compile(ASTSource(kernel, types, constants), target=target, options=options).asm["ptx"]
    assert "div.full" not in code
    assert "div.approx" not in code
    assert ".ftz" not in code
    if name in FORWARD:
        assert "div.rn.f32" in code
        assert "cvt.rn.bf16" in code
        assert "fma" not in code  # would round once where the pure functions round twice
