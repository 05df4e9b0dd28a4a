"""Learned step size quantization (LSQ), and the inheritance of steps by fewer bits.

LSQ (Esser et al., ICLR 2020, arXiv 1902.08153) in the form of OQA (Shen et al., arXiv 2010.04354).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from apq.errors import UserError
from elastic_nn.quantizers import fused
from elastic_nn.quantizers.base import Quantizer
from elastic_nn.quantizers.functional import code_range, dot, pieces

USUAL_STEP = 0.1  # of weights and activations at few bits


def quantize_lsq(v: Tensor, step: Tensor, bits: int, *, signed: bool, share: float = 1.0) -> Tensor:
    """Round `v` to whole multiples of |step|, a (1,) tensor that may be negative, within the codes of `bits` bits.

    Gradient of v: 1 strictly inside the range of the codes, else 0. Gradient of |step|: round(u) - u inside and the
    code outside, where u = v / |step|, summed over elements and divided by sqrt(n x highest code). Without the division
    it would dwarf the gradients of weights. n is the number of elements of the whole batch; `v` has the fraction
    `share` of them.
    """
    return _QuantizeLsq.apply(v, step, *code_range(bits, signed=signed), bits == 1 and signed, share)


def initial_step(v: Tensor, bits: int, *, signed: bool) -> Tensor:
    """(1,) initial step of LSQ: 2 mean|v| / sqrt(highest code), in at least float32."""
    highest = code_range(bits, signed=signed)[1]
    precise = v.to(torch.promote_types(v.dtype, torch.float32))
    return (2 / math.sqrt(highest)) * precise.abs().mean().reshape(1)


def inherited_step(step: Tensor, from_bits: int, to_bits: int) -> Tensor:
    """The initial step of a quantizer of fewer bits: doubled for each bit less.

    The codes then cover the same range, and every second value stays. With one bit less no value moves by more than
    |step|. This holds down to 2 bits (1 bit if unsigned). UserError unless the bits are fewer and at least 1.
    """
    if not 1 <= to_bits <= from_bits:
        raise UserError(f"{to_bits} bits cannot inherit the step of {from_bits}: they must be fewer, and at least 1")
    return step * 2 ** (from_bits - to_bits)


class LsqQuantizer(Quantizer):
    """Learned-step quantizer of weights (`signed`) or activations.

    A step of exactly 0 is not set. `calibrate`, or else the first call with gradients, sets it from the present values
    and bits. Before that a call without gradients uses the step of its own values and does not keep it. Processes that
    train together must calibrate first, or each would start from its own images.

    As published, training moves the step by amounts that do not depend on its size. It may cross zero and come back,
    because only its magnitude counts. If `scale_free`, it moves by fractions of its size (`relative_parameters`).
    """

    def __init__(self, signed: bool, *, scale_free: bool = False) -> None:
        super().__init__(signed)
        self.scale_free = scale_free
        self.step = nn.Parameter(torch.zeros(1))
        self._started = False  # so that a GPU need not wait for the step in every call
        self._count = 0  # values that the step was calibrated on

    def quantize(self, v: Tensor) -> Tensor:
        step = self.step if self._started or v.is_meta else self._start(v)
        quantize = fused.quantize_lsq if fused.runs_on(v) else quantize_lsq
        return quantize(v, step, self.bits, signed=self.signed, share=self.share)

    def _start(self, v: Tensor) -> Tensor:
        self._started = self.started
        if not self._started and not torch.is_grad_enabled():
            return initial_step(v, self.bits, signed=self.signed)
        if not self._started:
            self.forget()
            self.calibrate(v)
        return self.step

    @property
    def started(self) -> bool:
        return self._started or bool(self.step.item())

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Set the step of the mean magnitude of the values (`initial_step`).

        Several calls give, within rounding, the step of the mean over all their values.
        """
        step = initial_step(v, self.bits, signed=self.signed).to(self.step)
        if self._count:
            self.step.lerp_(step, v.numel() / (self._count + v.numel()))
        else:
            self.step.copy_(step)
        self._count += v.numel()

    def relative_parameters(self) -> dict[nn.Parameter, float]:
        return {self.step: USUAL_STEP} if self.scale_free else {}

    @torch.no_grad()
    def forget(self) -> None:
        self.step.zero_()
        self._started, self._count = False, 0

    @torch.no_grad()
    def inherit(self, from_bits: int, to_bits: int) -> None:
        """Double the step for each bit less."""
        self.step.copy_(inherited_step(self.step, from_bits, to_bits))

    @torch.no_grad()
    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer`. If the step is not set, it is that of the values `v`, which are needed then."""
        if v is None and not self.started:
            raise UserError(f"the step of {self.label} is not set: calibrate the network first, or give the values")
        scale = _size(self.step if self.started else initial_step(v, self.bits, signed=self.signed))
        return scale, torch.zeros_like(scale)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._started, self._count = False, 0
        super()._load_from_state_dict(*args, **kwargs)


class _QuantizeLsq(torch.autograd.Function):
    """Written out because autograd would keep six full-size tensors where one is enough."""

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
        sign = torch.where(step < 0, -1.0, 1.0).to(step.dtype)  # 0 counts as positive: a step of 0 must be able to grow
        return out, slope * sign / math.sqrt(ctx.count * high), None, None, None, None


def where_inside(values: Tensor, exact: Tensor, low: int, high: int, **out: Tensor) -> Tensor:
    """The values where low < exact < high, 0 elsewhere. Many times faster than a mask."""
    kernel = torch.ops.aten.hardtanh_backward
    return kernel.grad_input(values, exact, low, high, **out) if out else kernel(values, exact, low, high)


def _codes(exact: Tensor, low: int, high: int, sign_only: bool) -> Tensor:
    """Round to codes, in place."""
    exact.clamp_(low, high)
    return exact.sign_() if sign_only else exact.round_()


def _size(step: Tensor) -> Tensor:
    return step.abs().clamp_min(torch.finfo(step.dtype).tiny)  # all-zero values stay zero
