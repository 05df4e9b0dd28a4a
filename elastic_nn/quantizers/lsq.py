"""Learned step size quantization, and the inheritance of steps by fewer bits.

LSQ (Esser et al., ICLR 2020, arXiv 1902.08153) in the form of OQA (Shen et al., arXiv 2010.04354).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from apq.errors import UserError
from elastic_nn.quantizers.functional import dot, pieces


def code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest code. A single signed bit holds the sign: -1, 0 or 1.

    >>> code_range(4, signed=True), code_range(4, signed=False), code_range(1, signed=True)
    ((-8, 7), (0, 15), (-1, 1))
    """
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), max(2 ** (bits - 1) - 1, 1)


def quantize_lsq(v: Tensor, step: Tensor, bits: int, *, signed: bool, share: float = 1.0) -> Tensor:
    """`v` rounded to whole multiples of |step|, a (1,) tensor that may be negative, within the codes of `bits` bits.

    Gradient of v: 1 strictly inside the codes' range, else 0. Gradient of |step|: round(u) - u inside and the code
    outside, u = v / |step|, summed and divided by sqrt(elements of v x highest code), as it would dwarf a weight's.
    `share`: v is so much of all elements, as when a batch is shared; those count that way.
    """
    return _QuantizeLsq.apply(v, step, *code_range(bits, signed=signed), bits == 1 and signed, share)


def initial_step(v: Tensor, bits: int, *, signed: bool) -> Tensor:
    """(1,) step that LSQ starts from: 2 mean|v| / sqrt(highest code)."""
    highest = code_range(bits, signed=signed)[1]
    return (2 / math.sqrt(highest)) * v.float().abs().mean().reshape(1)


def initial_step_of_spread(v: Tensor, bits: int, *, signed: bool) -> Tensor:
    """(1,) step that LSQ+ (Bhalgat et al. 2020) starts weights from: its codes reach three deviations off the mean."""
    deviation, mean = torch.std_mean(v.float())
    furthest = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    return furthest.reshape(1) / (code_range(bits, signed=signed)[1] + 1)


def inherited_step(step: Tensor, from_bits: int, to_bits: int) -> Tensor:
    """The step that fewer bits start from: doubled for every bit that goes.

    Codes then cover the same range, and as half of them stay, no value moves further than |step| for one bit less: the
    mean distance of n values is at most |step|, their L1 distance n |step|. This holds down to 2 bits (1 unsigned); a
    single signed bit has no code between its two and 0.
    """
    if not 1 <= to_bits <= from_bits:
        raise UserError(f"{to_bits} bits cannot inherit the step of {from_bits}: they must be fewer, and at least 1")
    return step * 2 ** (from_bits - to_bits)


def inherited_state(state: Mapping[str, Tensor], from_bits: int, to_bits: int) -> dict[str, Tensor]:
    """The weights of a network of `from_bits` bits throughout as those that one of `to_bits` starts from."""
    return {
        key: inherited_step(tensor, from_bits, to_bits) if key.endswith(".step") else tensor
        for key, tensor in state.items()
    }


class LsqQuantizer(nn.Module):
    """Learned-step quantizer of weights (`signed`) or activations.

    `bits` and `enabled` (False: pass through unquantized) are run-time state. A step of exactly 0 means: not started.
    `calibrate`, or the first call with gradients, starts it from the values at hand and the bits of that moment; until
    then a call without gradients takes the step that these would give and keeps nothing. Processes that train together
    must calibrate before, or each would start from its own images. `share` is that of a training step's images that are
    in one pass: the gradient of an activation's step must not depend on how a batch is cut.
    """

    def __init__(self, signed: bool, initial: Callable[..., Tensor] = initial_step) -> None:
        super().__init__()
        self.signed, self.initial = signed, initial
        self.bits, self.enabled, self.share = 8, True, 1.0
        self.step = nn.Parameter(torch.zeros(1))
        self._started = False  # spares a GPU the wait for the step in every call

    def forward(self, v: Tensor) -> Tensor:
        if not self.enabled:
            return v
        step = self.step if self._started or v.is_meta else self._start(v)
        return quantize_lsq(v, step, self.bits, signed=self.signed, share=self.share)

    def _start(self, v: Tensor) -> Tensor:
        self._started = bool(self.step.item())
        if not self._started and not torch.is_grad_enabled():
            return self.initial(v, self.bits, signed=self.signed)
        if not self._started:
            self.calibrate(v)
        return self.step

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Set the step from the values, by their mean magnitude unless `initial` is another rule."""
        self.step.copy_(self.initial(v, self.bits, signed=self.signed))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._started = False
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class _QuantizeLsq(torch.autograd.Function):
    """Written out because autograd would keep six full-size tensors for what needs one."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, v: Tensor, step: Tensor, low: int, high: int, sign_only: bool, share: float
    ) -> Tensor:
        ctx.save_for_backward(v, step)
        ctx.codes, ctx.count = (low, high, sign_only), v.numel() / share
        size = _size(step)
        return _codes(torch.div(v, size, out=torch.empty_like(v)), low, high, sign_only).mul_(size)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (v, step), (low, high, sign_only) = ctx.saved_tensors, ctx.codes
        size, out, slope = _size(step), torch.empty_like(v), 0.0
        for v_, grad_, out_ in pieces(v, grad, out):
            exact = torch.div(v_, size, out=torch.empty_like(v_))
            inside = where_inside(exact, exact, low, high)  # elsewhere 0
            where_inside(grad_, exact, low, high, grad_input=out_)
            slope = slope + dot(grad_, _codes(exact, low, high, sign_only).sub_(inside))
        if not ctx.needs_input_grad[1]:
            return out, None, None, None, None, None
        return out, slope * step.sign() / math.sqrt(ctx.count * high), None, None, None, None


def where_inside(values: Tensor, exact: Tensor, low: int, high: int, **out: Tensor) -> Tensor:
    """The values where low < exact < high, else 0: many times faster than by a mask."""
    kernel = torch.ops.aten.hardtanh_backward
    return kernel.grad_input(values, exact, low, high, **out) if out else kernel(values, exact, low, high)


def _codes(exact: Tensor, low: int, high: int, sign_only: bool) -> Tensor:
    """Rounded in place."""
    exact.clamp_(low, high)
    return exact.sign_() if sign_only else exact.round_()


def _size(step: Tensor) -> Tensor:
    return step.abs().clamp_min(torch.finfo(step.dtype).tiny)  # all-zero values stay zero
