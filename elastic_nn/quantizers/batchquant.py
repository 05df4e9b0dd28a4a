"""BatchQuant: activations quantized by the range of their own batch, which a learned scale and offset correct.

QFA (Bai et al., NeurIPS 2021, arXiv 2105.08952). The subnets of a supernet have activations of very different sizes, so
that one learned range cannot serve them all; the range of the batch at hand does, as BatchNorm's mean and variance do.
How a range is estimated is a function; what it returns is averaged. `channel_range` is the published one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from apq.errors import UserError
from elastic_nn.quantizers.functional import dot, pieces
from elastic_nn.quantizers.lsq import code_range, where_inside
from elastic_nn.quantizers.shared_rows import rows_of_all

Rows = Callable[[Tensor], Tensor]  # (n, C) rows of this process's images -> (N, C) of all processes'
RangeEstimator = Callable[[Tensor, int, Rows], tuple[Tensor, Tensor]]  # activations, bits -> lowest, highest values

GROUP = 64  # images whose extremes count together, whatever the batch: the published code has 64 on each GPU
SMALLEST_STEP = torch.finfo(torch.float32).eps
SAMPLE, TRIED = 1 << 16, 1 << 13  # activations that a percentile is estimated on, and that an error is
STRIDE = 1_000_003  # prime: between them
PERCENT = 99.9  # of the activations that the percentile estimator keeps, on each side
SHRUNK = tuple(i / 20 for i in range(20, 0, -1))  # shares of the full range that the MSE estimator tries
NOT_CALIBRATED = "has no statistics of this network's activations at {bits} bits: calibrate the network first"


def same(rows: Tensor) -> Tensor:
    """The rows of a process that shares its batch with no other."""
    return rows


def channel_range(x: Tensor, bits: int, of_all: Rows = same) -> tuple[Tensor, Tensor]:
    """Each channel's lowest and highest value in every group of about 64 images, both (groups, C): x is (N, C, ...).

    Extremes grow with the number of images, and those of training and of calibration must mean the same. Groups are
    those of the whole batch, however many processes share it.

    >>> [edge.tolist() for edge in channel_range(torch.tensor([[-1.0, 2.0], [3.0, -4.0]]), 4)]
    [[[-1.0, -4.0]], [[3.0, 2.0]]]
    """
    low, high = (of_all(edge) for edge in x.flatten(2).aminmax(dim=2)) if x.ndim > 2 else (of_all(x), of_all(x))
    groups = max(1, round(len(low) / GROUP))
    return (
        torch.stack([part.amin(dim=0) for part in low.tensor_split(groups)]),
        torch.stack([part.amax(dim=0) for part in high.tensor_split(groups)]),
    )


def sample_range(x: Tensor, bits: int, of_all: Rows = same) -> tuple[Tensor, Tensor]:
    """Each image's lowest and highest value, both (N,)."""
    return x.flatten(1).aminmax(dim=1)


def full_range(x: Tensor, bits: int, of_all: Rows = same) -> tuple[Tensor, Tensor]:
    """Lowest and highest value."""
    return x.aminmax()


def percentile_range(x: Tensor, bits: int, of_all: Rows = same) -> tuple[Tensor, Tensor]:
    """What all but the outermost 0.1 % of the values on each side lie between."""
    kept = torch.tensor([1 - PERCENT / 100, PERCENT / 100], device=x.device)
    low, high = _thinned(x, SAMPLE).float().quantile(kept)
    return low, high


def least_error_range(x: Tensor, bits: int, of_all: Rows = same) -> tuple[Tensor, Tensor]:
    """The share of the full range, in steps of 5 %, that loses least to rounding and clipping in squared error."""
    values = _thinned(x, TRIED).float()
    low, high = (edge * torch.tensor(SHRUNK, device=x.device)[:, None] for edge in values.aminmax())  # (candidates, 1)
    step, zero_point = affine_of_range(low, high, bits, signed=False)
    one, zero = torch.ones_like(low), torch.zeros_like(low)
    quantized = quantize_affine(values.expand(len(SHRUNK), -1), step, zero_point, one, zero, bits, signed=False)
    best = (quantized - values).square().mean(dim=1).argmin()
    return low[best, 0], high[best, 0]


def affine_of_range(low: Tensor, high: Tensor, bits: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Step and zero point, both () float64, with which the codes of `bits` bits cover the range and 0.

    0 is a code, so that what padding and ReLU make is exact. An empty range has step 1 and zero point 0.

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
    """What a learned scale multiplies the codes by: softplus with beta = ln 2, log2(1 + 2^scale), 1 for 0.

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
    """`x` rounded to the codes of `bits` bits: round(clip(x gain / step + zero_point + offset)), and back.

    Gradient of x: 1 strictly inside the range of the codes, else 0. So the zeros that ReLU makes pass none where the
    lowest code is theirs. Gain and offset learn too, with their gradients multiplied by `gradient_factor`; step and
    zero point are constants.
    """
    first, last = code_range(bits, signed=signed)
    dtype = torch.promote_types(x.dtype, gain.dtype)  # codes of half precision would be rounded twice
    affine = (step.to(dtype), zero_point.to(dtype), gain, offset)
    return _QuantizeAffine.apply(x, *affine, first, last, gradient_factor)


class _QuantizeAffine(torch.autograd.Function):
    """Written out because autograd would keep six full-size tensors for what needs one."""

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
        ctx.save_for_backward(x, step, zero_point, gain, offset)
        ctx.codes, ctx.factor = (first, last), gradient_factor
        codes = _exact_codes(x, step, zero_point, gain, offset).clamp_(first, last).round_()
        return _values(codes, step, zero_point, gain, offset).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *affine = ctx.saved_tensors
        step, _, gain, offset = affine
        first, last = ctx.codes
        out, for_gain, clipped = torch.empty_like(x), 0.0, 0.0
        for x_, grad_, out_ in pieces(x, grad, out):
            exact = _exact_codes(x_, *affine)
            grad_ = grad_.to(exact.dtype)
            passed = where_inside(grad_, exact, first, last)
            out_.copy_(passed)
            quantized = _values(exact.clamp_(first, last).round_(), *affine)
            for_gain = for_gain + dot(passed, x_.to(passed.dtype)) - dot(grad_, quantized)
            clipped = clipped + grad_.sum() - passed.sum()
        if not any(ctx.needs_input_grad[3:5]):
            return out, None, None, None, None, None, None, None
        for_gain, for_offset = ctx.factor * for_gain / gain, -ctx.factor * clipped * step / gain
        return out, None, None, for_gain.view_as(gain), for_offset.view_as(offset), None, None, None


def _exact_codes(x: Tensor, step: Tensor, zero_point: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    # One operation after the other, as published: codes that lie on an edge between two then round the same way.
    return (x * gain).div_(step).add_(zero_point).add_(offset)


def _values(codes: Tensor, step: Tensor, zero_point: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """In place."""
    return codes.sub_(zero_point).sub_(offset).mul_(step).div_(gain)


class BatchQuantizer(nn.Module):
    """Activation quantizer of one number of bits whose range comes from its inputs.

    In training the range is that of the batch at hand; with a `momentum` the running average of the batches' ranges,
    which trains on. In evaluation it is `low` to `high`, an average over `seen` images that only a calibration pass
    collects (`collecting`), or the running one: evaluation without is an error. `label` names the layer in it. Where a
    batch is shared by processes (`synchronised`) its range is that of the whole batch, or the mean of their estimates.

    The statistics are those of one subnet: a supernet forgets them when it becomes another. `scale` and `offset` are
    learned by all.
    """

    def __init__(self, signed: bool, estimate: RangeEstimator = channel_range, momentum: float | None = None) -> None:
        super().__init__()
        self.signed, self.estimate, self.momentum = signed, estimate, momentum
        self.bits, self.enabled, self.label = 8, True, "a layer"
        self.collecting = self.synchronised = False
        self.scale, self.offset = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        for edge in ("low", "high"):
            self.register_buffer(edge, torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self._calibrated: bool | None = False  # None: as `seen` says; spares a GPU the wait for it in every call

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        step, zero_point = affine_of_range(*self._range(x), self.bits, signed=self.signed)
        gain = gain_of_scale(self.scale)
        return quantize_affine(x, step, zero_point, gain, self.offset, self.bits, signed=self.signed)

    @torch.no_grad()
    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:  # both (1,)
        if self.training and not self.collecting and self.momentum is None and not self.surely_empty:
            self.forget()  # weights that change change the activations
        if not self.training and not self.collecting:
            if not self.calibrated and not x.is_meta:
                raise UserError(f"the activation quantizer of {self.label} {NOT_CALIBRATED.format(bits=self.bits)}")
            return self.low, self.high
        low, high = self._estimated(x)
        if self.collecting:
            self.seen.add_(len(x))
            self._average(low, high, len(x) / self.seen)
        elif self.momentum is not None:
            self._average(low, high, torch.where(self.seen > 0, self.momentum, 1.0))
            self.seen.add_(len(x))
            return self.low.clone(), self.high.clone()
        return low, high

    def _estimated(self, x: Tensor) -> tuple[Tensor, Tensor]:  # both (1,)
        low, high = self.estimate(x, self.bits, rows_of_all if self.synchronised else same)
        dtype = torch.promote_types(low.dtype, torch.float32)
        edges = torch.stack([low.mean(dtype=dtype), high.mean(dtype=dtype)])
        if self.synchronised:
            dist.all_reduce(edges)
            edges /= dist.get_world_size()
        return edges[:1], edges[1:]

    def _average(self, low: Tensor, high: Tensor, share: Tensor) -> None:
        self.low.lerp_(low.to(self.low.dtype), share.to(self.low.dtype))
        self.high.lerp_(high.to(self.high.dtype), share.to(self.high.dtype))
        self._calibrated = True

    @property
    def calibrated(self) -> bool:
        """Whether there are statistics to evaluate with."""
        if not self._calibrated:
            self._calibrated = bool(self.seen.item())
        return self._calibrated

    @property
    def surely_empty(self) -> bool:
        """Whether there can be no statistics, as far as is known without waiting for a GPU."""
        return self._calibrated is False

    @torch.no_grad()
    def forget(self) -> None:
        """Drop the statistics."""
        for statistic in (self.low, self.high, self.seen):
            statistic.zero_()
        self._calibrated = False

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Take the statistics from this one batch."""
        self.forget()
        low, high = self._estimated(x)
        self.seen.fill_(len(x))
        self._average(low, high, torch.ones_like(self.low))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._calibrated = None

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, estimate={self.estimate.__name__}, momentum={self.momentum}"


def _thinned(x: Tensor, n: int) -> Tensor:
    """At most `n` values of a tensor, evenly spread over its images, channels and places."""
    flat = x.detach().flatten()
    if flat.numel() <= n:
        return flat
    # A prime stride, unlike a round one, is no multiple of a row or a map.
    return flat[torch.arange(n, device=x.device) * STRIDE % flat.numel()]
