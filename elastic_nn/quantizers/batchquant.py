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
from elastic_nn.quantizers.affine import affine_of_range, gain_of_scale, quantize_affine
from elastic_nn.quantizers.base import Quantizer
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
        self._collecting = self._holding = False

    def quantize(self, v: Tensor) -> Tensor:
        step, zero_point = affine_of_range(*self._range(v), self.bits, signed=self.signed)
        gain = gain_of_scale(self.scale)
        return quantize_affine(v, step, zero_point, gain, self.offset, self.bits, signed=self.signed)

    @torch.no_grad()
    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:  # both (1,)
        if self._holding or not (self.training or self._collecting):
            if not self.calibrated and not x.is_meta:
                raise UserError(f"the activation quantizer of {self.label} {NOT_CALIBRATED.format(bits=self.bits)}")
            return self.low, self.high
        low, high = self._estimated(x)
        if self._collecting:
            self._collect(low, high, len(x))
        elif self.momentum is None:
            self.invalidate()  # training changes the activations
        else:
            self._average(low, high, torch.where(self.seen > 0, self.momentum, 1.0))
            self.seen.add_(len(x))
            return self.low.clone(), self.high.clone()
        return low, high

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
        self._average(low, high, n_images / self.seen)

    def _average(self, low: Tensor, high: Tensor, share: Tensor) -> None:
        self.low.lerp_(low.to(self.low.dtype), share.to(self.low.dtype))
        self.high.lerp_(high.to(self.high.dtype), share.to(self.high.dtype))
        self._calibrated = True

    @property
    def calibrated(self) -> bool:
        """Whether there are statistics for evaluation."""
        if not self._calibrated:
            self._calibrated = bool(self.seen.item())
        return self._calibrated

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Take statistics from a batch. Several calls give the average, weighted by their numbers of images."""
        self._collect(*self._estimated(v), len(v))

    @torch.no_grad()
    def forget(self) -> None:
        for statistic in (self.low, self.high, self.seen):
            statistic.zero_()
        self._calibrated = False

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

        Without statistics the range is that of the batch `v`, as in training.
        """
        if v is None and not self.calibrated:
            raise UserError(f"the activation quantizer of {self.label} {NOT_CALIBRATED.format(bits=self.bits)}")
        low, high = (self.low, self.high) if self.calibrated else self._estimated(v)
        step, zero_point = affine_of_range(low, high, self.bits, signed=self.signed)
        return step.to(self.scale) / gain_of_scale(self.scale), zero_point.to(self.scale) + self.offset

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._calibrated = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, estimate={self.estimate.__name__}, momentum={self.momentum}"
