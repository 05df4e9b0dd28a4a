"""Quantizers, and the schemes that a network is built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from elastic_nn.quantizers.kmeans import KMeansWeightQuantizer
from elastic_nn.quantizers.linear import LinearActivationQuantizer, LinearWeightQuantizer

__all__ = [
    "FLOAT",
    "KMEANS",
    "LINEAR",
    "SCHEMES",
    "KMeansWeightQuantizer",
    "LinearActivationQuantizer",
    "LinearWeightQuantizer",
    "QuantScheme",
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
SCHEMES = {scheme.name: scheme for scheme in (LINEAR, KMEANS)}
