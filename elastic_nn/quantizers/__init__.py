"""Quantizers, and the schemes that a network is built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from apq.errors import UserError
from elastic_nn.quantizers.base import NoQuantizer, Quantizer
from elastic_nn.quantizers.batchquant import BatchQuantizer
from elastic_nn.quantizers.kmeans import QUICK_ITER, KMeansWeightQuantizer
from elastic_nn.quantizers.linear import LinearActivationQuantizer, LinearWeightQuantizer
from elastic_nn.quantizers.lsq import LsqQuantizer
from elastic_nn.quantizers.per_bits import PerBits
from elastic_nn.quantizers.range_estimators import RangeEstimator, channel_range, least_error_range, percentile_range

__all__ = [
    "BATCHQUANT",
    "FLOAT",
    "KMEANS",
    "LINEAR",
    "LSQ",
    "MIXED",
    "SCHEMES",
    "BatchQuantizer",
    "KMeansWeightQuantizer",
    "LinearActivationQuantizer",
    "LinearWeightQuantizer",
    "LsqQuantizer",
    "NoQuantizer",
    "PerBits",
    "QuantScheme",
    "Quantizer",
    "scheme_named",
]


@dataclass(frozen=True)
class QuantScheme:
    """How layers get their quantizers: one call for each operand of a layer.

    `activation` takes whether the activations may be negative. `mixed_precision`: one supernet serves all bit-widths.
    `learned_steps`: a supernet is trained at one bit-width, and fewer bits inherit its ranges. `quick_weight` makes
    weight quantizers that calibrate faster, for comparing policies.

    A scheme from outside is put into SCHEMES under its name.
    """

    name: str
    weight: Callable[[], Quantizer] = NoQuantizer
    activation: Callable[[bool], Quantizer] = NoQuantizer
    mixed_precision: bool = False
    learned_steps: bool = False
    quick_weight: Callable[[], Quantizer] | None = None

    @property
    def trains_supernets(self) -> bool:
        """Whether supernets are trained with these quantizers; others are added to float supernets afterwards."""
        return self == FLOAT or self.mixed_precision or self.learned_steps

    def quick(self) -> QuantScheme:
        """The scheme for comparing policies."""
        return self if self.quick_weight is None else replace(self, weight=self.quick_weight)


FLOAT = QuantScheme("float")
LINEAR = QuantScheme("linear", weight=LinearWeightQuantizer, activation=LinearActivationQuantizer)
KMEANS = QuantScheme(
    "kmeans", weight=KMeansWeightQuantizer, quick_weight=partial(KMeansWeightQuantizer, max_iter=QUICK_ITER)
)
# OQA rounds every activation to codes from 0 up, so that what is negative in a linear bottleneck or an h-swish is lost.
LSQ = QuantScheme(
    "lsq",
    weight=lambda: LsqQuantizer(signed=True),
    activation=lambda signed: LsqQuantizer(signed=False),
    learned_steps=True,
)


def _mixed(name: str, activation: Callable[[bool], Quantizer]) -> QuantScheme:
    """Mixed precision: steps for each bit-width, over shared float weights."""
    return QuantScheme(
        name,
        weight=lambda: PerBits(lambda: LsqQuantizer(signed=True)),
        activation=lambda signed: PerBits(lambda: activation(signed)),
        mixed_precision=True,
    )


def _batch(estimate: RangeEstimator, momentum: float | None = None) -> Callable[[bool], Quantizer]:
    return lambda signed: BatchQuantizer(signed, estimate, momentum)


RUNNING_MOMENTUM = 0.1  # as BatchNorm's
BATCHQUANT = _mixed("batchquant", _batch(channel_range))
# What BatchQuant is compared with: other estimates of the range, a running range, and learned steps.
MIXED = {
    scheme.name: scheme
    for scheme in (
        BATCHQUANT,
        _mixed("batchquant-percentile", _batch(percentile_range)),
        _mixed("batchquant-mse", _batch(least_error_range)),
        _mixed("running-minmax", _batch(channel_range, RUNNING_MOMENTUM)),
        _mixed("lsq-per-bits", LsqQuantizer),
    )
}
SCHEMES = {scheme.name: scheme for scheme in (FLOAT, LINEAR, KMEANS, LSQ)} | MIXED


def scheme_named(name: str) -> QuantScheme:
    """The scheme of this name in SCHEMES. UserError names the known ones."""
    if name not in SCHEMES:
        raise UserError(f"unknown quantizers {name!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
