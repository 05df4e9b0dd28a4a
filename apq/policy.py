"""Quantization policies: the bits of each layer of any network, in HAQ's terms (Wang et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.files import Record, read_json
from apq.layers import FIXED_BITS, ConvLayer

QUANTIZERS = {"linear": (2, 8), "kmeans": (1, 8)}  # fewest and most bits; a row may be added from outside
WEIGHTS_ONLY = {"kmeans"}  # quantizers that leave activations in full precision
# Names of the schemes in `elastic_nn.quantizers` that supernets are trained with, listed here without its imports.
SUPERNET_QUANTIZERS = (
    *("float", "lsq"),
    *("batchquant", "batchquant-percentile", "batchquant-mse", "running-minmax", "lsq-per-bits"),
)
NOT_QUANTIZED = -1  # activation bits of a layer whose input is not quantized
IMAGE_BITS = (NOT_QUANTIZED, FIXED_BITS)  # choices for the input image, which has 8 bits already


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The bits of each layer of a network.

    `bits` has one row for each of `names`: (weights, activations) for the linear quantizer, (weights,) for k-means,
    which leaves activations in full precision. The input of the first layer is the image, whose pixels have 8 bits:
    its activation bits are NOT_QUANTIZED or 8. UserError for an unknown quantizer and bits that it does not have.
    """

    quantizer: str
    names: tuple[str, ...]
    bits: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise UserError(f"unknown quantizer {self.quantizer!r}; known: {', '.join(QUANTIZERS)}")
        if len(self.names) != len(self.bits):
            raise UserError(f"the policy has bits for {len(self.bits)} layers, the network has {len(self.names)}")
        fewest, most = QUANTIZERS[self.quantizer]
        width = 1 if self.quantizer in WEIGHTS_ONLY else 2
        for i, (name, row) in enumerate(zip(self.names, self.bits, strict=True)):
            allowed = [tuple(range(fewest, most + 1)), IMAGE_BITS if i == 0 else tuple(range(fewest, most + 1))]
            fits = [type(b) is int and b in choices for b, choices in zip(row, allowed, strict=False)]
            if len(row) != width or not all(fits):
                form = "[weight bits, activation bits]" if width == 2 else "weight bits"
                raise UserError(
                    f"layer {i} ({name}) of a {self.quantizer} policy has bits {list(row)}; it must be {form}, each "
                    f"from {fewest} to {most}, activations of the first layer {NOT_QUANTIZED} (the image as it is)"
                )

    @property
    def strategy(self) -> list[Any]:
        """The published form: [[weight bits, activation bits], ...], or [weight bits, ...] for k-means."""
        return [list(row) if len(row) > 1 else row[0] for row in self.bits]

    def matrix(self, image_bits: int = FIXED_BITS) -> np.ndarray:
        """(layers, 2 or 1) bits for pricing. An image that is not quantized counts as `image_bits`."""
        bits = np.array(self.bits)
        return np.where(bits == NOT_QUANTIZED, image_bits, bits)


def layer_names(layers: Sequence[ConvLayer]) -> tuple[str, ...]:
    """The names of the layers in running order, each once, also where a layer runs twice."""
    return tuple(dict.fromkeys(layer.name for layer in layers))


def first_runs(layers: Sequence[ConvLayer]) -> list[ConvLayer]:
    """The first run of each layer, in the order of `layer_names`."""
    first: dict[str, ConvLayer] = {}
    for layer in layers:
        first.setdefault(layer.name, layer)
    return list(first.values())


def priced_layers(layers: Sequence[ConvLayer], policy: Policy, image_bits: int = FIXED_BITS) -> list[ConvLayer]:
    """The layers at the bits of a linear policy."""
    bits = dict(zip(policy.names, policy.matrix(image_bits).tolist(), strict=True))
    return [replace(layer, w_bits=bits[layer.name][0], a_bits=bits[layer.name][-1]) for layer in layers]


def policy_from_strategy(quantizer: str, layers: Sequence[ConvLayer], strategy: Any) -> Policy:
    """The policy of a published strategy for a network of these layers. UserError where it does not fit."""
    if not isinstance(strategy, list) or not all(isinstance(row, (int, list)) for row in strategy):
        raise UserError("a policy is a list with one entry a layer: bits, or [weight bits, activation bits]")
    rows = tuple(tuple(row) if isinstance(row, list) else (row,) for row in strategy)
    return Policy(quantizer=quantizer, names=layer_names(layers), bits=rows)


def load_strategy(path: Path) -> Any:
    """The strategy in a JSON file: a list, or an object with a list under "strategy", as policies are stored.

    `FILE#/a/0/b` reads part of a larger file by a JSON pointer (RFC 6901, without escapes). UserError where there is no
    strategy.
    """
    name, _, pointer = str(path).partition("#/")
    data = read_json(Path(name))
    try:
        for key in filter(None, pointer.split("/")):
            data = data[int(key) if isinstance(data, list) else key]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"{name} has nothing at /{pointer}") from error
    found = data.get("strategy") if isinstance(data, dict) else data
    if not isinstance(found, list):
        raise UserError(f'{path} holds no policy: that is a list, or an object with a list under "strategy"')
    return found


def policy_to_dict(policy: Policy, layers: Sequence[ConvLayer]) -> Record:
    """The policy as plain JSON data. With its layers it can be priced without the network."""
    return {
        "quantizer": policy.quantizer,
        "strategy": policy.strategy,
        "layers": [asdict(layer) for layer in layers],
    }


def policy_from_dict(data: Any) -> tuple[Policy, list[ConvLayer]]:
    """Inverse of `policy_to_dict`; UserError for other data."""
    known = {field.name for field in fields(ConvLayer)}
    try:
        layers = [ConvLayer(**row) for row in data["layers"]]
        quantizer, strategy = data["quantizer"], data["strategy"]
    except (TypeError, KeyError) as error:
        raise UserError(f"not a stored policy: it needs quantizer, strategy and layers of {sorted(known)}") from error
    return policy_from_strategy(quantizer, layers, strategy), layers
