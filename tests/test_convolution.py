"""Convolutions without plans against torch's, in float64: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from example_spaces import TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, assert_learns_alike, on_kernels, outside_the_interpreter, passes_in_the_interpreter
from test_launches import Operations

from apq.genes import smallest_subnet
from apq.presets import QFA_MBV3_GLYPHS
from elastic_nn.modules import convolution
from elastic_nn.modules.convolution import convolve, pointwise, switched, without_plans
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets

EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def reference(x, w, grad, stride, depthwise):
    """Result and gradients in float64, and the sums of the magnitudes of their terms."""
    found = []
    for change in (torch.Tensor.double, lambda v: v.double().abs()):
        x64, w64, grad64 = (change(v.detach()).requires_grad_() for v in (x, w, grad))
        groups = x.size(1) if depthwise else 1
        y = F.conv2d(x64, w64, None, stride, w.size(-1) // 2, groups=groups)
        y.backward(grad64)
        found.append((y.detach(), x64.grad, w64.grad))
    return found


def assert_close(found, expected, magnitudes, dtype, terms):
    """Rounded once to the type, after sums in float32."""
    for mine, exact, magnitude in zip(found, expected, magnitudes, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == exact.shape
        allowed = EPSILON[dtype] * exact.abs() + terms * EPSILON[torch.float32] * magnitude + 2.0**-24  # of float16
        assert ((mine.double() - exact).abs() <= allowed).all()


@on_kernels
@settings(max_examples=30)
@given(
    st.sampled_from([1, 3, 5, 7]),
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 41), st.integers(1, 17), st.integers(1, 17)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 2**20),
)
@example(7, 2, (2, 40, 15, 16), torch.bfloat16, True, 0)  # more channels than a block has; odd and even sides
@example(5, 1, (3, 1, 1, 1), torch.float32, False, 1)
def test_depthwise_convolutions_are_those_of_torch(kernel_size, stride, shape, dtype, channels_last, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw).to(DEVICE, dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    w = torch.randn(shape[1], 1, kernel_size, kernel_size, generator=draw).to(DEVICE, dtype)
    x, w = x.requires_grad_(), w.requires_grad_()
    with without_plans(), Operations() as operations:
        y = convolve(x, w, stride=stride, depthwise=True)
    assert operations.counts["aten.convolution.default"] == 0
    grad = torch.randn(y.shape, generator=draw).to(y)
    y.backward(grad)
    expected, magnitudes = reference(x, w, grad, stride, depthwise=True)
    assert_close((y, x.grad, w.grad), expected, magnitudes, dtype, terms=max(grad.numel() // shape[1], kernel_size**2))


@on_kernels
@pytest.mark.parametrize("programs", [1, 12, 2048])
def test_weight_gradients_of_any_number_of_parts(programs, monkeypatch):
    """Programs go over several blocks of positions, or a block has none to share."""
    monkeypatch.setattr(convolution, "PROGRAMS", programs)
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 5, side, side, generator=draw).to(DEVICE) for side in (13, 7))
    w = torch.zeros(5, 1, 3, 3, device=DEVICE)
    expected, magnitudes = reference(x, w, grad, 2, depthwise=True)
    found = convolution.weight_gradient(x, grad, 3, 2)
    assert_close([found], expected[2:], magnitudes[2:], torch.float32, terms=3 * 49)


@on_kernels
def test_no_images():
    x, w = torch.zeros(0, 3, 4, 4, device=DEVICE, requires_grad=True), torch.ones(3, 1, 3, 3, device=DEVICE)
    w.requires_grad_()
    with without_plans():
        y = convolve(x, w, stride=2, depthwise=True)
    y.sum().backward()
    assert y.shape == (0, 3, 2, 2)
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_1x1_convolutions_are_products_of_matrices(shape, outputs, has_bias, channels_last):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    w = torch.randn(outputs, shape[1], 1, 1, generator=draw, dtype=torch.float64)
    bias = torch.randn(outputs, generator=draw, dtype=torch.float64) if has_bias else None
    y = pointwise(x, w, bias)
    torch.testing.assert_close(y, F.conv2d(x, w, bias))
    assert y.is_contiguous(memory_format=torch.channels_last)


@on_kernels
def test_autocast_gives_its_type():
    """To layers of float32 weights, as float supernets have; their gradients stay in float32."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 5, 5, generator=draw).to(DEVICE)
    for shape, depthwise in (((8, 1, 3, 3), True), ((4, 8, 1, 1), False)):
        w = torch.randn(shape, generator=draw).to(DEVICE).requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16), without_plans(), Operations() as operations:
            y = convolve(x, w, depthwise=depthwise)
        assert operations.counts["aten.convolution.default"] == 0
        assert y.dtype == torch.bfloat16
        groups = shape[0] if depthwise else 1
        expected = F.conv2d(x.bfloat16().double(), w.bfloat16().double(), None, 1, shape[-1] // 2, groups=groups)
        torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-5)
        y.sum().backward()
        assert w.grad.dtype == torch.float32


@on_kernels
@pytest.mark.parametrize("space", [TINY, QFA_MBV3_GLYPHS], ids=lambda space: space.name)
def test_a_supernet_has_one_convolution_with_a_plan(space):
    """The first one. Its subnets on their own have a plan for each."""
    torch.manual_seed(0)
    net = DynamicProxylessNASNets(space=space).to(DEVICE).eval()
    net.activate(smallest_subnet(space))
    own = net.get_active_subnet().eval()
    x = torch.randn(2, space.in_channels, 16, 16, device=DEVICE)
    counts = []
    for one in (net, own):
        with torch.autocast(DEVICE.type, torch.bfloat16), Operations() as operations, torch.no_grad():
            one(x)
        counts.append(operations.counts["aten.convolution.default"])
    layers = sum(isinstance(module, torch.nn.Conv2d) or hasattr(module, "active_kernel") for module in own.modules())
    assert counts == [1, layers]


@on_kernels
def test_a_supernet_without_plans_learns_as_with_them():
    torch.manual_seed(0)
    net = DynamicQuantizedProxylessNASNets(space=TINY).to(DEVICE)
    x = torch.randn(4, TINY.in_channels, 8, 8, device=DEVICE)
    assert_learns_alike(net, x, switched)


@on_kernels
def test_where_the_kernels_fail_torch_computes(monkeypatch):
    def fails(*args, **settings):
        raise RuntimeError("ptxas: no such thing")

    monkeypatch.setattr(convolution, "input_gradient", fails)
    monkeypatch.setattr(convolution, "_works", convolution._works.__wrapped__)
    x, w = torch.ones(1, 3, 4, 4, device=DEVICE), torch.ones(3, 1, 3, 3, device=DEVICE)
    with without_plans(), pytest.warns(UserWarning, match="depthwise convolutions take .*: RuntimeError: ptxas"):
        y = convolve(x, w, depthwise=True)
    assert torch.equal(y, F.conv2d(x, w, None, 1, 1, groups=3))


@on_kernels
def test_where_plans_are_made():
    """Outside of the context, and wherever it is switched off."""
    x, w = torch.ones(1, 3, 4, 4, device=DEVICE), torch.ones(3, 1, 3, 3, device=DEVICE)

    def plans():
        with Operations() as operations:
            convolve(x, w, depthwise=True)
        return operations.counts["aten.convolution.default"]

    assert plans() == 1
    with without_plans():
        assert plans() == 0
        with switched(False):
            assert plans() == 1
        assert plans() == 0
    assert plans() == 1


@outside_the_interpreter
@pytest.mark.parametrize("name", ["convolve", "weight_gradient"])
def test_kernels_load_many_channels_at_once_and_are_not_compiled_for_sizes(name, tmp_path, monkeypatch):
    """For a GPU of compute capability 8.0, also where there is none."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from elastic_nn.modules import depthwise_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(depthwise_kernels, name)
    assert {param.name for param in kernel.params if param.do_not_specialize} == {*depthwise_kernels.SIZES}
    n_positions, n_channels = convolution.BLOCK if name == "convolve" else convolution.GRADIENT_BLOCK
    blocks = {"POSITIONS": n_positions, "CHANNELS": n_channels, "TAPS": 8}
    values = {"K": 7, "STRIDE": 2, "GRADIENT": False, "WIDTH": 8, **blocks}
    constants = {arg: values[arg] for arg in kernel.arg_names if arg in values}
    types = {
        arg: "constexpr" if arg in constants else "i32" if arg in depthwise_kernels.SIZES
        else "*fp32" if arg == "partials" else "*bf16"
        for arg in kernel.arg_names
    }  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if types[arg][0] == "*"}
    source = ASTSource(kernel, types, constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    assert {*re.findall(r"ld\.global\S*", code)} <= {"ld.global.v4.b32", "ld.global.v2.b32"}


@outside_the_interpreter
def test_the_interpreter_runs_the_tests_above():
    passes_in_the_interpreter(__file__)
