"""BatchQuant: activations quantized by the range of their batch, with a learned scale and offset.

QFA (Bai et al., NeurIPS 2021, arXiv 2105.08952). The activations of the subnets of a supernet differ too much for one
learned range. The range of the present batch fits each subnet, as the mean and variance of BatchNorm do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apq.errors import UserError
from elastic_nn.quantizers import fused
from elastic_nn.quantizers.affine import affine_of_range, gain_of_scale, quantize_affine
from elastic_nn.quantizers.base import Quantizer, Rounding
from elastic_nn.quantizers.range_estimators import RangeEstimator, channel_range, own_rows, rows_of_all

NOT_CALIBRATED = "has no statistics of this network's activations at {bits} bits: calibrate the network first"


class BatchQuantizer(Quantizer):
    """Activation quantizer of one bit-width whose range comes from its inputs.

    In training the range is that of the present batch, or with a `momentum` the running average over batches. In
    evaluation it is `low` to `high`: the average over the `seen` images of a pass that collects statistics, or the
    running average. UserError for evaluation without statistics. If processes share a batch, its range is that of the
    whole batch, or the mean over the processes.

    Collected statistics are those of one subnet and its weights. Running ones, like the learned `scale` and `offset`,
    are for all subnets.
    """

    needs_statistics = True

    def __init__(self, signed: bool, estimate: RangeEstimator = channel_range, momentum: float | None = None) -> None:
        super().__init__(signed)
        self.estimate, self.momentum = estimate, momentum
        self.scale, self.offset = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        for edge in ("low", "high"):
            self.register_buffer(edge, torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self._calibrated: bool | None = False  # None: read it from `seen`, for which a GPU must wait
        self._collecting = self._holding = self._loaded = False

    def quantize(self, v: Tensor) -> Tensor:
        low, high = self._range(v)
        self._keep(low, high, v)
        gain = gain_of_scale(self.scale)
        if fused.runs_on(v):
            return fused.quantize_in_range(v, low, high, gain, self.offset, self.bits, signed=self.signed)
        step, zero_point = affine_of_range(low, high, self.bits, signed=self.signed)
        return quantize_affine(v, step, zero_point, gain, self.offset, self.bits, signed=self.signed)

    @property
    def _follows_batch(self) -> bool:
        """Whether the range depends on the values to quantize. Otherwise it is `low` to `high`."""
        return not self._holding and (self.training or self._collecting)

    @torch.no_grad()
    def _range(self, x: Tensor | None) -> tuple[Tensor, Tensor]:  # both (1,)
        """The range at which `x` is quantized now; of the statistics if `x` is None. Nothing is kept."""
        if x is None or not self._follows_batch:
            if not self.calibrated and (x is None or not x.is_meta):
                raise UserError(f"the activation quantizer of {self.label} {NOT_CALIBRATED.format(bits=self.bits)}")
            return self.low, self.high
        low, high = self._estimated(x)
        if self.momentum is None or self._collecting:
            return low, high
        share = torch.where(self.seen > 0, self.momentum, 1.0).to(self.low.dtype)
        return self.low.lerp(low.to(self.low.dtype), share), self.high.lerp(high.to(self.high.dtype), share)

    @torch.no_grad()
    def _keep(self, low: Tensor, high: Tensor, x: Tensor) -> None:
        """Update the statistics, after `x` was quantized at its range."""
        if self._collecting:
            self._collect(low, high, len(x))
        elif self._follows_batch and self.momentum is None:
            self.invalidate()  # training changes the activations
        elif self._follows_batch:
            self.low.copy_(low)
            self.high.copy_(high)
            self.seen.add_(len(x))
            self._calibrated = True

    def _estimated(self, x: Tensor) -> tuple[Tensor, Tensor]:  # both (1,)
        low, high = self.estimate(x, self.bits, rows_of_all if self.synchronised else own_rows)
        dtype = torch.promote_types(low.dtype, torch.float32)
        edges = torch.stack([low.mean(dtype=dtype), high.mean(dtype=dtype)])
        if self.synchronised:
            dist.all_reduce(edges)
            edges /= dist.get_world_size()
        return edges[:1], edges[1:]

    def _collect(self, low: Tensor, high: Tensor, n_images: int) -> None:
        self.seen.add_(n_images)
        share = (n_images / self.seen).to(self.low.dtype)
        self.low.lerp_(low.to(self.low.dtype), share)
        self.high.lerp_(high.to(self.high.dtype), share)
        self._calibrated = True

    @property
    def calibrated(self) -> bool:
        """Whether there are statistics for evaluation."""
        if not self._calibrated:
            self._calibrated = bool(self.seen.item())
        return self._calibrated

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Take statistics from a batch. Several calls give the average, weighted by their numbers of images.

        That is not the range of all images together: extremes grow with the size of a batch.
        """
        if self._loaded:
            self.forget()
        self._collect(*self._estimated(v), len(v))

    @torch.no_grad()
    def forget(self) -> None:
        for statistic in (self.low, self.high, self.seen):
            statistic.zero_()
        self._calibrated = self._loaded = False

    def invalidate(self) -> None:
        """Drop collected statistics; running ones stay."""
        if self.momentum is None and self._calibrated is not False:  # not known to be empty
            self.forget()

    def begin_statistics(self) -> None:
        """Start to collect anew, each batch quantized by its own range; or use the running range if there is one."""
        self._holding = self.momentum is not None and self.calibrated
        self._collecting = not self._holding
        if self._collecting:
            self.forget()

    def end_statistics(self) -> None:
        self._collecting = self._holding = False

    @torch.no_grad()
    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer`. The scale is step / gain. The zero point, not whole, is that of the range + the offset.

        With `v` the range is the one at which `quantize` would round `v` now, which depends on `v` in training. Without
        `v` it is that of the statistics.
        """
        step, zero_point, gain, offset = self.rounding(v)
        return step / gain, zero_point + offset

    @torch.no_grad()
    def rounding(self, v: Tensor | None = None) -> Rounding:
        step, zero_point = affine_of_range(*self._range(v), self.bits, signed=self.signed)
        like = self.scale
        return Rounding(step.to(like), zero_point.to(like), gain_of_scale(like), self.offset.detach().clone())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._calibrated, self._loaded = None, True

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, estimate={self.estimate.__name__}, momentum={self.momentum}"
