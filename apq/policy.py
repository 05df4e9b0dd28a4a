"""Quantization policies: the bits of each layer of any network, in HAQ's terms (Wang et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from apq.bounds import is_whole
from apq.errors import UserError
from apq.files import Record, read_json
from apq.layers import FIXED_BITS, ConvLayer
from apq.limits import LARGEST_LAYER, MOST_BITS


@dataclass(frozen=True)
class PolicyQuantizer:
    """What policies and searches of bits know about a quantizer.

    UserError for bits outside 1 to 8, and for a quantizer of weights alone that is priced on accelerators: its layers
    compute in floating point.

    Attributes:
        fewest, most: its range of bits.
        weights_only: whether it leaves activations in full precision.
        priced: whether accelerators have costs of its layers. Otherwise budgets limit the size.
        ratio: default budget of a search, as a fraction of the cost at 8 bits, or of the size of 32-bit weights where
            it quantizes weights alone. The default is HAQ's.
    """

    fewest: int
    most: int
    weights_only: bool = False
    priced: bool = True
    ratio: float = 0.6

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most <= 8:
            raise UserError(f"bits of a quantizer must be from 1 to 8, not {self.fewest} to {self.most}")
        if self.weights_only and self.priced:
            raise UserError("a quantizer of weights alone has no costs on an accelerator: give priced=False")

    @property
    def bits(self) -> range:
        """All its bits, from the fewest."""
        return range(self.fewest, self.most + 1)


LINEAR = "linear"  # the quantizer by default
LINEAR_PUBLISHED = "linear-published"  # with clips of activations that are calibrated and learned as APQ and HAQ do
QUANTIZERS = {
    LINEAR: PolicyQuantizer(2, 8),
    LINEAR_PUBLISHED: PolicyQuantizer(2, 8),
    "kmeans": PolicyQuantizer(1, 8, weights_only=True, priced=False, ratio=0.1),
}
"""Quantizers of policies by name. A row may be added from outside, for a scheme in `elastic_nn.quantizers.SCHEMES`."""
QUANTIZER_HELP = "quantizers of a float supernet's subnets (default: the recipe's)"


def of_activations() -> tuple[str, ...]:
    """Names of the quantizers of weights and activations."""
    return tuple(name for name, quantizer in QUANTIZERS.items() if not quantizer.weights_only)


# Names of the schemes in `elastic_nn.quantizers` that supernets are trained with, listed here without its imports.
SUPERNET_QUANTIZERS = (
    *("float", "lsq", "lsq-scale-free"),
    *("batchquant", "batchquant-published", "batchquant-percentile", "batchquant-mse", "running-minmax"),
    "lsq-per-bits",
)
NOT_QUANTIZED = -1  # activation bits of a layer whose input is not quantized
IMAGE_BITS = (NOT_QUANTIZED, FIXED_BITS)  # choices for the input image, which has 8 bits already


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The bits of each layer of a network.

    `bits` has one row for each of `names`: (weights, activations), or (weights,) for a quantizer of weights alone, such
    as k-means. The input of the first layer is the image, whose pixels have 8 bits: its activation bits are
    NOT_QUANTIZED or 8. UserError for an unknown quantizer and bits that it does not have.
    """

    quantizer: str
    names: tuple[str, ...]
    bits: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise UserError(
                f"unknown quantizer {self.quantizer!r}; known: {', '.join(QUANTIZERS)}; APQ_PLUGINS may add others"
            )
        if len(self.names) != len(self.bits):
            raise UserError(f"the policy has bits for {len(self.bits)} layers, the network has {len(self.names)}")
        known = QUANTIZERS[self.quantizer]
        width, bits = 1 if known.weights_only else 2, tuple(known.bits)
        for i, (name, row) in enumerate(zip(self.names, self.bits, strict=True)):
            allowed = [bits, IMAGE_BITS if i == 0 else bits]
            fits = [type(b) is int and b in choices for b, choices in zip(row, allowed, strict=False)]
            if len(row) != width or not all(fits):
                form = "[weight bits, activation bits]" if width == 2 else "weight bits"
                raise UserError(
                    f"layer {i} ({name}) of a {self.quantizer} policy has bits {list(row)}; it must be {form}, each "
                    f"from {bits[0]} to {bits[-1]}, activations of the first layer {NOT_QUANTIZED} (the image as it is)"
                )

    @property
    def strategy(self) -> list[Any]:
        """The published form: [[weight bits, activation bits], ...], or [weight bits, ...] of weights alone."""
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
    """The layers at the bits of a policy that quantizes weights and activations."""
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
    for place, layer in enumerate(layers):
        _check_layer(place, layer)
    if not isinstance(quantizer, str):
        raise UserError(f"a policy's quantizer must be a name, not a {type(quantizer).__name__}")
    return policy_from_strategy(quantizer, layers, strategy), layers


def _check_layer(place: int, layer: ConvLayer) -> None:
    """UserError unless a layer that was read has fields that a layer can have."""
    for name, value in vars(layer).items():
        if name in ("w_bits", "a_bits"):
            fits = is_whole(value, 1, MOST_BITS)
        elif name == "name" or isinstance(getattr(ConvLayer, name, None), bool):
            fits = isinstance(value, str if name == "name" else bool)
        else:
            fits = is_whole(value, 1, LARGEST_LAYER)
        if not fits:
            raise UserError(f"not a stored policy: {name} of layer {place} is out of range or of another type")
