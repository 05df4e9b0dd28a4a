"""Convolutions of elastic layers, on a GPU by ways that need no plan.

cuDNN plans every convolution of a new shape before its first run: it chooses an algorithm and builds kernels. Random
subnets have new shapes in nearly every step. Where shapes change, `without_plans` computes 1x1 convolutions as products
of matrices, and depthwise ones by kernels that are compiled once for each kernel size and stride.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from elastic_nn.quantizers import fused

# Sizes of the blocks of kernels: positions and channels. Not tuned: no GPU was there.
BLOCK, GRADIENT_BLOCK = (64, 32), (16, 32)
PROGRAMS = 2048  # about as many as make a large GPU busy; they share the positions of a weight gradient

_allowed = os.environ.get("APQ_PLANLESS") != "0"
_wanted = False


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    """Context in which convolutions need no plan where they can, unless APQ_PLANLESS=0 is set."""
    global _wanted
    before, _wanted = _wanted, True
    try:
        yield
    finally:
        _wanted = before


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Context in which `without_plans` does what it says, or nothing, whatever APQ_PLANLESS says."""
    global _allowed
    before, _allowed = _allowed, on
    try:
        yield
    finally:
        _allowed = before


def convolve(x: Tensor, w: Tensor, bias: Tensor | None = None, *, stride: int = 1, depthwise: bool = False) -> Tensor:
    """Convolution with "same" padding: (N, C, H, W) by (D, C, K, K), or depthwise (C, 1, K, K), to (N, D, H', W').

    K is odd; H' is H / stride, rounded up. A depthwise convolution has no bias.
    """
    kernel_size = w.size(-1)
    if _wanted and _allowed and fused.runs_on(x):
        if depthwise and _works(x.device):
            return _Depthwise.apply(*_cast(x, w), stride)
        # In float32 cuDNN computes with TensorFloat-32 unless it is told not to, and products of matrices do not.
        if not depthwise and kernel_size == stride == 1 and _cast(x)[0].dtype != torch.float32:
            return pointwise(x, w, bias)
    return F.conv2d(x, w, bias, stride, kernel_size // 2, groups=x.size(1) if depthwise else 1)


def pointwise(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution as a product of matrices: (N, C, H, W) by (D, C, 1, 1). The result is channels last."""
    return F.linear(x.permute(0, 2, 3, 1), w.flatten(1), bias).permute(0, 3, 1, 2)


def depthwise_convolution(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """Depthwise convolution: (N, C, H, W) by (C, 1, K, K), channels last."""
    n, c, h, wd = x.shape
    out = _images((n, c, -(-h // stride), -(-wd // stride)), x)
    _convolve(x, w, out, stride, gradient=False)
    return out.to(x.dtype)


def input_gradient(grad: Tensor, w: Tensor, side: tuple[int, int], stride: int) -> Tensor:
    """Gradient of the input of a depthwise convolution, which has this height and width, from that of its output."""
    out = _images((*grad.shape[:2], *side), grad)
    _convolve(grad, w, out, stride, gradient=True)
    return out.to(grad.dtype)


def weight_gradient(x: Tensor, grad: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Gradient of the weights of a depthwise convolution in float32, (C, 1, K, K), from that of its output."""
    (n, c, h, wd), (n_positions, n_channels) = grad.shape, GRADIENT_BLOCK
    positions, blocks = n * h * wd, -(-c // n_channels)
    parts = max(1, min(-(-positions // n_positions), PROGRAMS // (blocks * kernel_size)))
    partials = torch.empty(parts, c, kernel_size, kernel_size, device=x.device)
    width, sizes = _width(c), (positions, h, wd, c // _width(c), *x.shape[2:])
    taps = 1 << (kernel_size - 1).bit_length()
    with torch.cuda.device_of(x):
        _kernels().weight_gradient[blocks, kernel_size, parts](
            _rows(x), _rows(grad), partials, *sizes, kernel_size, stride, width, taps, n_positions, n_channels
        )
    return partials.sum(0)[:, None]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.stride = stride
        return depthwise_convolution(x, w, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (of_x, of_w, _) = ctx.saved_tensors, ctx.needs_input_grad
        for_x = input_gradient(grad, w, x.shape[2:], ctx.stride) if of_x else None
        for_w = weight_gradient(x, grad, w.size(-1), ctx.stride).to(w.dtype) if of_w else None
        return for_x, for_w, None


@cache
def _kernels() -> ModuleType:
    from elastic_nn.modules import depthwise_kernels

    return depthwise_kernels


@cache
def _works(device: torch.device) -> bool:
    return fused.builds("depthwise convolutions", _try_all, device)


def _try_all(device: torch.device) -> Tensor:
    x, w = (torch.ones(1, 1, n, n, device=device, requires_grad=True) for n in (4, 3))
    return _Depthwise.apply(x, w, 1).sum()


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the type that autocast computes convolutions in, where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _convolve(x: Tensor, w: Tensor, out: Tensor, stride: int, *, gradient: bool) -> None:
    """Run the kernel of the convolution, or of the gradient of its input."""
    (n, c, h, wd), (n_positions, n_channels), width = out.shape, BLOCK, _width(out.size(1))
    if not out.numel():
        return
    grid = -(-n * h * wd // n_positions), -(-c // n_channels)
    sizes = n * h * wd, h, wd, c // width, *x.shape[2:]
    with torch.cuda.device_of(x):
        _kernels().convolve[grid](
            _rows(x),
            w.flatten(1).T.contiguous(),
            out,
            *sizes,
            w.size(-1),
            stride,
            gradient,
            width,
            n_positions,
            n_channels,
        )


def _images(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An empty tensor, channels last. Triton's interpreter cuts digits off instead of rounding: torch rounds for it."""
    dtype = torch.float32 if fused.INTERPRETED else like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """(N, H, W, C), as it lies in memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def _width(channels: int) -> int:
    return 8 if channels % 8 == 0 else 1
