"""Quantizers, and the schemes that a network is built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from apq.errors import UserError
from elastic_nn.quantizers.kmeans import KMeansWeightQuantizer
from elastic_nn.quantizers.linear import LinearActivationQuantizer, LinearWeightQuantizer
from elastic_nn.quantizers.lsq import LsqQuantizer

__all__ = [
    "FLOAT",
    "KMEANS",
    "LINEAR",
    "LSQ",
    "SCHEMES",
    "KMeansWeightQuantizer",
    "LinearActivationQuantizer",
    "LinearWeightQuantizer",
    "LsqQuantizer",
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
SCHEMES = {scheme.name: scheme for scheme in (LINEAR, KMEANS, LSQ)}


def scheme_named(name: str) -> QuantScheme:
    """The scheme that a file speaks of, "float" included; UserError names the known ones."""
    known = {FLOAT.name: FLOAT, **SCHEMES}
    if name not in known:
        raise UserError(f"unknown quantizers {name!r}; known: {', '.join(known)}")
    return known[name]
