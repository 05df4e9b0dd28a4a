"""Quantizers on CUDA: one Triton kernel forward and one backward, in place of the pure functions' many.

The pure functions say what is computed: `quantize_activation` and `quantize_weight` in `functional`, `quantize_lsq` in
`lsq`, `quantize_affine` in `affine`. The functions here give the values that those have in float32, rounded once to the
type of the input, and their gradients but for the order of sums. Where autocast is on, float32 inputs give the type
that autocast would turn them into for the next layer.

`runs_on` says where the kernels run: on CUDA devices from compute capability 8.0 on, unless APQ_FUSED=0 is set. With
TRITON_INTERPRET=1 set before Python starts, Triton's interpreter runs them on a CPU: slow, but the same kernels.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from elastic_nn.quantizers.functional import code_range, highest_code

TYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability that computes with bfloat16
BLOCK, WARPS = 2048, 8  # elements of a block, and groups of 32 threads that share it
PARTIALS = 1024  # most partial sums, as in `triton_kernels`
PROGRAMS = PARTIALS  # most programs: about as many as an H100 runs at once
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_wanted = os.environ.get("APQ_FUSED") != "0"


def runs_on(v: Tensor) -> bool:
    """Whether the kernels quantize this tensor. Otherwise the pure functions do."""
    kind = v.device.type
    if kind == "cpu" and not INTERPRETED:
        return False
    return _wanted and kind in ("cuda", "cpu") and v.dtype in TYPES and _works(v.device)


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Context in which the kernels are used where they run, or not at all, whatever APQ_FUSED says."""
    global _wanted
    before, _wanted = _wanted, on
    try:
        yield
    finally:
        _wanted = before


@cache
def _kernels() -> ModuleType:
    from elastic_nn.quantizers import triton_kernels

    return triton_kernels


@cache
def _works(device: torch.device) -> bool:
    """Whether this device runs the kernels. A warning if it should but Triton cannot build them."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < OLDEST):
        return False
    return builds("quantizers", _try_all, device)


def builds(what: str, attempt: Callable[[torch.device], Tensor], device: torch.device) -> bool:
    """Whether kernels compute the scalar of an attempt, and its gradients. A warning if Triton cannot build them."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            attempt(device).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # whatever a compiler raises
        text = f"{type(fault).__name__}: {fault}".splitlines()[0]
        warnings.warn(f"{what} take several times as long, because Triton fails: {text}", stacklevel=2)
        return False
    return True


def _try_all(device: torch.device) -> Tensor:
    one = torch.ones(1, device=device, requires_grad=True)
    return (
        _Activation.apply(one, one, 1, False, 0.0, False)
        + _Weight.apply(one, one, 1)
        + _Lsq.apply(one, one, 0, 1, False, 1.0)
        + _InRange.apply(one, one, one, one, one, 0, 1)
    ).sum()


def quantize_activation(
    x: Tensor, clip: Tensor, bits: int, *, signed: bool, smallest: float, magnitude: bool
) -> Tensor:
    """`functional.quantize_activation` with a learned clip, of which with `magnitude` the absolute value counts.

    It counts as at least `smallest`. The gradient of the clip is that of the tensor that is given.
    """
    return _Activation.apply(x, clip, highest_code(bits, signed=signed), signed, smallest, magnitude)


def quantize_weight(w: Tensor, clip: Tensor, bits: int) -> Tensor:
    """`functional.quantize_weight` at a clip (1,), or if it is not above 0 at the largest magnitude of the weights."""
    return _Weight.apply(w, clip, highest_code(bits, signed=True))


def quantize_lsq(v: Tensor, step: Tensor, bits: int, *, signed: bool, share: float = 1.0) -> Tensor:
    """`lsq.quantize_lsq`."""
    return _Lsq.apply(v, step, *code_range(bits, signed=signed), bits == 1 and signed, share)


def quantize_in_range(
    x: Tensor, low: Tensor, high: Tensor, gain: Tensor, offset: Tensor, bits: int, *, signed: bool
) -> Tensor:
    """`affine.quantize_affine` at the step and zero point of a range, `affine.affine_of_range`. All are (1,)."""
    return _InRange.apply(x, low, high, gain, offset, *code_range(bits, signed=signed))


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, clip: Tensor, top: int, signed: bool, smallest: float, magnitude: bool
    ) -> Tensor:
        x, out, dtype = _dense(x)
        ctx.save_for_backward(x, clip)
        ctx.settings = signed, smallest, magnitude
        _launch("quantize_activation", x, out, clip, smallest, float(top), x.numel(), signed, magnitude)
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, clip), (signed, smallest, magnitude) = ctx.saved_tensors, ctx.settings
        grad, out, partials = _for_gradient(x, grad)
        _launch("activation_gradient", x, grad, out, partials, clip, smallest, x.numel(), signed, magnitude)
        for_clip = torch.empty_like(clip) if ctx.needs_input_grad[1] else None
        if for_clip is not None:
            _add_up("clip_gradient", partials, _programs(x), clip, for_clip, magnitude)
        return out.to(x.dtype), for_clip, None, None, None, None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, w: Tensor, clip: Tensor, top: int) -> Tensor:
        w, out, dtype = _dense(w)
        ctx.dtype, partials = w.dtype, _partials(w)
        _launch("largest_magnitude", w, partials, w.numel())
        _launch("quantize_weight", w, out, partials, _programs(w), clip, float(top), w.numel())
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None, None


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, v: Tensor, step: Tensor, low: int, high: int, sign_only: bool, share: float
    ) -> Tensor:
        v, out, dtype = _dense(v)
        ctx.save_for_backward(v, step)
        ctx.settings, ctx.root = (float(low), float(high), v.numel(), sign_only), math.sqrt(v.numel() / share * high)
        _launch("quantize_lsq", v, out, step, *ctx.settings)
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, step = ctx.saved_tensors
        grad, out, partials = _for_gradient(v, grad)
        _launch("lsq_gradient", v, grad, out, partials, step, *ctx.settings)
        for_step = torch.empty_like(step) if ctx.needs_input_grad[1] else None
        if for_step is not None:
            _add_up("step_gradient", partials, _programs(v), step, for_step, ctx.root)
        return out.to(v.dtype), for_step, None, None, None, None


class _InRange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        low: Tensor,
        high: Tensor,
        gain: Tensor,
        offset: Tensor,
        first: int,
        last: int,
    ) -> Tensor:
        x, out, dtype = _dense(x)
        affine = torch.empty(4, device=x.device)  # step, zero point, gain, offset
        ctx.save_for_backward(x, affine)
        ctx.codes = float(first), float(last)
        _add_up("affine_of_range", low, high, gain, offset, affine, *ctx.codes)
        _launch("quantize_affine", x, out, affine, *ctx.codes, x.numel())
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, affine = ctx.saved_tensors
        grad, out, partials = _for_gradient(x, grad)
        _launch("affine_gradient", x, grad, out, partials, affine, *ctx.codes, x.numel())
        for_gain = for_offset = None
        if any(ctx.needs_input_grad[3:5]):
            both = torch.empty(2, device=x.device)
            _add_up("gain_and_offset_gradients", partials, _programs(x), affine, both)
            for_gain, for_offset = both[:1], both[1:]
        return out.to(x.dtype), None, None, for_gain, for_offset, None, None


def _dense(v: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """The values without gaps in memory, an empty tensor of their layout, and the type of the result.

    Kernels go through memory from its start, in whatever order dimensions lie there.
    """
    dtype = v.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(v.device.type):
        dtype = torch.get_autocast_dtype(v.device.type)
    out = _empty(v, dtype)
    if out.stride() != v.stride():  # a slice, or an expanded tensor
        v = torch.empty_like(v).copy_(v)
    return v, out, dtype


def _for_gradient(v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient in the layout of the values `v`, an empty tensor for theirs, and room for partial sums."""
    if grad.stride() != v.stride():
        grad = torch.empty_like(v, dtype=grad.dtype).copy_(grad)
    return grad, _empty(v, v.dtype), _partials(v)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    # GPUs round float32 to bfloat16 as torch does, but the interpreter cuts digits off: torch rounds its results.
    return torch.empty_like(like, dtype=torch.float32 if INTERPRETED else dtype)


def _partials(v: Tensor) -> Tensor:
    """Room for a sum of each program, twice."""
    return torch.empty(2 * PARTIALS, device=v.device)


def _programs(v: Tensor) -> int:
    return max(1, min(PROGRAMS, -(-v.numel() // BLOCK)))


def _launch(name: str, v: Tensor, *rest: Any) -> None:
    """Run a kernel over the blocks of a tensor."""
    with torch.cuda.device_of(v):
        getattr(_kernels(), name)[(_programs(v),)](v, *rest, BLOCK, num_warps=WARPS)


def _add_up(name: str, first: Tensor, *rest: Any) -> None:
    """Run a kernel of one program."""
    with torch.cuda.device_of(first):
        getattr(_kernels(), name)[(1,)](first, *rest)
