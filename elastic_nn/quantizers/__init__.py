"""Quantizers, and the schemes that a network is built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from apq.errors import UserError
from elastic_nn.quantizers.batchquant import (
    BatchQuantizer,
    RangeEstimator,
    channel_range,
    least_error_range,
    percentile_range,
)
from elastic_nn.quantizers.kmeans import KMeansWeightQuantizer
from elastic_nn.quantizers.linear import LinearActivationQuantizer, LinearWeightQuantizer
from elastic_nn.quantizers.lsq import LsqQuantizer
from elastic_nn.quantizers.per_bits import PerBits

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
    "PerBits",
    "QuantScheme",
    "scheme_named",
]


@dataclass(frozen=True)
class QuantScheme:
    """How a layer gets its quantizers: one call a layer; activations are told whether they may be negative."""

    name: str
    weight: Callable[[], nn.Module]
    activation: Callable[[bool], nn.Module]


FLOAT = QuantScheme("float", weight=nn.Identity, activation=lambda signed: nn.Identity())
LINEAR = QuantScheme("linear", weight=LinearWeightQuantizer, activation=LinearActivationQuantizer)
KMEANS = QuantScheme("kmeans", weight=KMeansWeightQuantizer, activation=lambda signed: nn.Identity())
# OQA rounds every activation to codes from 0 up, so that what is negative in a linear bottleneck or an h-swish is lost.
LSQ = QuantScheme("lsq", weight=lambda: LsqQuantizer(signed=True), activation=lambda signed: LsqQuantizer(signed=False))


def _mixed(name: str, activation: Callable[[bool], nn.Module]) -> QuantScheme:
    """Mixed precision in one supernet: steps of their own for each number of bits, over shared float weights."""
    return QuantScheme(
        name,
        weight=lambda: PerBits(lambda: LsqQuantizer(signed=True)),
        activation=lambda signed: PerBits(lambda: activation(signed)),
    )


def _batch(estimate: RangeEstimator, momentum: float | None = None) -> Callable[[bool], nn.Module]:
    return lambda signed: BatchQuantizer(signed, estimate, momentum)


RUNNING_MOMENTUM = 0.1  # as BatchNorm's
BATCHQUANT = _mixed("batchquant", _batch(channel_range))
# What BatchQuant is compared with: other estimates of the range, a running one, and learned steps.
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
SCHEMES = {scheme.name: scheme for scheme in (LINEAR, KMEANS, LSQ)} | MIXED


def scheme_named(name: str) -> QuantScheme:
    """The scheme that a file speaks of, "float" included; UserError names the known ones."""
    known = {FLOAT.name: FLOAT, **SCHEMES}
    if name not in known:
        raise UserError(f"unknown quantizers {name!r}; known: {', '.join(known)}")
    return known[name]
