"""Quantizers, and the schemes that networks are built with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from apq.errors import UserError
from elastic_nn.quantizers.base import NoQuantizer, Quantizer, Rounding
from elastic_nn.quantizers.batchquant import BatchQuantizer
from elastic_nn.quantizers.kmeans import QUICK_ITER, KMeansWeightQuantizer
from elastic_nn.quantizers.linear import LinearActivationQuantizer, LinearWeightQuantizer
from elastic_nn.quantizers.lsq import LsqQuantizer
from elastic_nn.quantizers.per_bits import PerBits
from elastic_nn.quantizers.per_kernel import PerKernel
from elastic_nn.quantizers.range_estimators import (
    RangeEstimator,
    channel_range,
    least_error_range,
    percentile_range,
    whole_channel_range,
)

__all__ = [
    "BATCHQUANT",
    "FLOAT",
    "KMEANS",
    "LINEAR",
    "LINEAR_PUBLISHED",
    "LSQ",
    "LSQ_SCALE_FREE",
    "MIXED",
    "SCHEMES",
    "BatchQuantizer",
    "KMeansWeightQuantizer",
    "LinearActivationQuantizer",
    "LinearWeightQuantizer",
    "LsqQuantizer",
    "NoQuantizer",
    "PerBits",
    "PerKernel",
    "QuantScheme",
    "Quantizer",
    "Rounding",
    "scheme_named",
]


@dataclass(frozen=True)
class QuantScheme:
    """Which quantizers a network is built with. A scheme from outside is put into SCHEMES under its name.

    Attributes:
        weight, activation: functions that make the quantizer of an operand. `activation` takes whether the activations
            may be negative.
        mixed_precision: one supernet serves all bit-widths. Its depthwise layers have quantizers for each kernel size,
            and the gradients of its weights' steps count whole filters, as QFA's do.
        learned_steps: a supernet has one bit-width, and one of fewer bits inherits its ranges.
        per_process: each process estimates ranges from its own images alone, so that what is trained depends on the
            number of processes.
        quick_weight: like `weight`, but faster to calibrate, for comparing policies.
    """

    name: str
    weight: Callable[[], Quantizer] = NoQuantizer
    activation: Callable[[bool], Quantizer] = NoQuantizer
    mixed_precision: bool = False
    learned_steps: bool = False
    per_process: bool = False
    quick_weight: Callable[[], Quantizer] | None = None

    @property
    def quantizes(self) -> bool:
        """Whether any operand is quantized. Otherwise networks are float."""
        return not (self.weight is NoQuantizer and self.activation is NoQuantizer)

    @property
    def trains_supernets(self) -> bool:
        """Whether supernets are trained with these quantizers. Others are added to trained float supernets."""
        return not self.quantizes or self.mixed_precision or self.learned_steps

    def per_kernel(self, kernel_sizes: Sequence[int]) -> QuantScheme:
        """The scheme of a layer with several kernel sizes: in mixed precision each size has quantizers of its own."""
        if not self.mixed_precision:
            return self
        return replace(
            self,
            weight=lambda: PerKernel(self.weight, kernel_sizes),
            activation=lambda signed: PerKernel(partial(self.activation, signed), kernel_sizes),
        )

    def quick(self) -> QuantScheme:
        """The same scheme with `quick_weight`, for comparing policies."""
        return self if self.quick_weight is None else replace(self, weight=self.quick_weight)


FLOAT = QuantScheme("float")
LINEAR = QuantScheme("linear", weight=LinearWeightQuantizer, activation=LinearActivationQuantizer)
LINEAR_PUBLISHED = QuantScheme(
    "linear-published",
    weight=LinearWeightQuantizer,
    activation=partial(LinearActivationQuantizer, published=True),
)
KMEANS = QuantScheme(
    "kmeans", weight=KMeansWeightQuantizer, quick_weight=partial(KMeansWeightQuantizer, max_iter=QUICK_ITER)
)
# OQA has codes from 0 up for all activations: negative values of linear bottlenecks and h-swish are lost.
LSQ = QuantScheme(
    "lsq",
    weight=lambda: LsqQuantizer(signed=True),
    activation=lambda signed: LsqQuantizer(signed=False),
    learned_steps=True,
)

# The same with steps that move by fractions of their size. Those of LSQ get lost where activations are far below 1.
LSQ_SCALE_FREE = replace(
    LSQ,
    name="lsq-scale-free",
    weight=lambda: LsqQuantizer(signed=True, scale_free=True),
    activation=lambda signed: LsqQuantizer(signed=False, scale_free=True),
)


def _mixed(name: str, activation: Callable[[bool], Quantizer], *, per_process: bool = False) -> QuantScheme:
    """A scheme of mixed precision: a quantizer for each bit-width, over shared float weights."""
    return QuantScheme(
        name,
        weight=lambda: PerBits(lambda: LsqQuantizer(signed=True)),
        activation=lambda signed: PerBits(lambda: activation(signed)),
        mixed_precision=True,
        per_process=per_process,
    )


def _batch(estimate: RangeEstimator, momentum: float | None = None) -> Callable[[bool], Quantizer]:
    return lambda signed: BatchQuantizer(signed, estimate, momentum)


RUNNING_MOMENTUM = 0.1  # as BatchNorm's
BATCHQUANT = _mixed("batchquant", _batch(channel_range))
# BatchQuant; with the range of all images of a process, as published, instead of groups of 64; and what it is compared
# with: other estimates of the range, a running range, learned steps.
MIXED = {
    scheme.name: scheme
    for scheme in (
        BATCHQUANT,
        _mixed("batchquant-published", _batch(whole_channel_range), per_process=True),
        _mixed("batchquant-percentile", _batch(percentile_range), per_process=True),
        _mixed("batchquant-mse", _batch(least_error_range), per_process=True),
        _mixed("running-minmax", _batch(channel_range, RUNNING_MOMENTUM)),
        _mixed("lsq-per-bits", LsqQuantizer),
    )
}
SCHEMES = {scheme.name: scheme for scheme in (FLOAT, LINEAR, LINEAR_PUBLISHED, KMEANS, LSQ, LSQ_SCALE_FREE)} | MIXED


def scheme_named(name: str) -> QuantScheme:
    """The scheme of this name. UserError names the known ones."""
    if not isinstance(name, str) or name not in SCHEMES:  # files may hold anything
        raise UserError(f"unknown quantizers {name!r}; known: {', '.join(SCHEMES)}; APQ_PLUGINS may add others")
    return SCHEMES[name]
