"""Affine fake quantization: step and zero point of a range, learned gain and offset, straight-through gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from elastic_nn.quantizers.functional import code_range, dot, pieces
from elastic_nn.quantizers.lsq import where_inside

SMALLEST_STEP = torch.finfo(torch.float32).eps


def affine_of_range(low: Tensor, high: Tensor, bits: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Step and zero point, float64 of the shape of `low`, at which the codes of `bits` bits cover the range and 0.

    0 has a code of its own, so that zeros of padding and ReLU are exact. An empty range has step 1 and zero point 0.

    >>> step, zero = affine_of_range(torch.tensor(-1.25), torch.tensor(2.5), 2, signed=True)
    >>> step.item(), zero.item()
    (1.25, -1.0)
    """
    first, last = code_range(bits, signed=signed)
    low, high = low.double().clamp_max(0), high.double().clamp_min(0)
    step = ((high - low) / (last - first)).clamp_min(SMALLEST_STEP)
    zero_point = (first - torch.round(low / step)).clamp(first, last)
    empty = low == high
    return torch.where(empty, 1.0, step), torch.where(empty, 0.0, zero_point)


def gain_of_scale(scale: Tensor) -> Tensor:
    """The factor by which a learned scale multiplies the codes: log2(1 + 2^scale), which is 1 at 0.

    >>> [round(gain_of_scale(torch.tensor(scale)).item(), 3) for scale in (0.0, 1.0, -1.0)]
    [1.0, 1.585, 0.585]
    """
    return nn.functional.softplus(scale, beta=math.log(2))


def quantize_affine(
    x: Tensor,
    step: Tensor,
    zero_point: Tensor,
    gain: Tensor,
    offset: Tensor,
    bits: int,
    *,
    signed: bool,
    gradient_factor: float = 1.0,
) -> Tensor:
    """Round `x` to codes of `bits` bits, round(clip(x gain / step + zero_point + offset)), and back to values.

    Gradient of x: 1 strictly inside the range of the codes, else 0. So zeros of a ReLU have no gradient where their
    code is the lowest. The gradients of gain and offset are multiplied by `gradient_factor`. Step and zero point are
    constants.
    """
    first, last = code_range(bits, signed=signed)
    dtype = torch.promote_types(x.dtype, gain.dtype)  # in half precision codes would be rounded twice
    affine = (step.to(dtype), zero_point.to(dtype), gain, offset)
    return _QuantizeAffine.apply(x, *affine, first, last, gradient_factor)


class _QuantizeAffine(torch.autograd.Function):
    """Written out because autograd would keep six full-size tensors where one is enough."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        step: Tensor,
        zero_point: Tensor,
        gain: Tensor,
        offset: Tensor,
        first: int,
        last: int,
        gradient_factor: float,
    ) -> Tensor:
        ctx.codes, ctx.factor = (first, last), gradient_factor
        out = torch.empty_like(x)
        for x_, out_ in pieces(x, out):
            room = _room(out_, gain.dtype)
            codes = _exact_codes(x_, step, zero_point, gain, offset, room).clamp_(first, last).round_()
            _put(_values(codes, step, zero_point, gain, offset), out_)
        ctx.save_for_backward(x, out, step, zero_point, gain, offset)  # the next layer keeps its input, too
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *affine = ctx.saved_tensors
        step, _, gain, offset = affine
        out, for_gain, clipped, room = torch.empty_like(x), 0.0, 0.0, None
        for x_, y_, grad_, out_ in pieces(x, y, grad, out):
            if room is None or room.shape != x_.shape:  # one for all pieces: new memory costs more than arithmetic
                room = torch.empty_like(x_, dtype=gain.dtype)
            exact, grad_ = _exact_codes(x_, *affine, room), grad_.to(gain.dtype)
            passed = where_inside(grad_, exact, *ctx.codes, grad_input=_room(out_, gain.dtype))
            _put(passed, out_)
            for_gain = for_gain + dot(passed, x_.to(passed.dtype)) - dot(grad_, y_.to(passed.dtype))
            clipped = clipped + grad_.sum() - passed.sum()
        if not any(ctx.needs_input_grad[3:5]):
            return out, None, None, None, None, None, None, None
        for_gain, for_offset = ctx.factor * for_gain / gain, -ctx.factor * clipped * step / gain
        return out, None, None, for_gain.view_as(gain), for_offset.view_as(offset), None, None, None


def _exact_codes(x: Tensor, step: Tensor, zero_point: Tensor, gain: Tensor, offset: Tensor, out: Tensor) -> Tensor:
    # Single operations, as published, so that values on the edge between two codes round in the same way.
    return torch.mul(x, gain, out=out).div_(step).add_(zero_point).add_(offset)


def _values(codes: Tensor, step: Tensor, zero_point: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """The values of codes, in place."""
    return codes.sub_(zero_point).sub_(offset).mul_(step).div_(gain)


def _room(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to compute: in the result itself, if it is precise enough."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def _put(values: Tensor, out: Tensor) -> None:
    if values is not out:
        out.copy_(values)
