"""A layout: how published code names the tensors of its networks, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from apq.errors import UserError

ROLES = {"expand": "inverted_bottleneck", "depthwise": "depth_conv", "project": "point_linear"}
SQUEEZE = {"reduce": "depth_conv.se.fc.reduce", "excite": "depth_conv.se.fc.expand"}
MBV2_LAYERS = {"first_conv": "first_conv", "feature_mix_layer": "feature_mix_layer", "classifier": "classifier"}
MBV3_LAYERS = {
    "first_conv": "first_conv",
    "feature_mix_layer": "final_expand_layer",
    "pooled_mix_layer": "feature_mix_layer",
    "classifier": "classifier",
}
POOLED_WEIGHTS = ("feature_mix_layer.conv.weight", "feature_mix_layer.conv.conv.weight")  # of MobileNetV3's layouts


@dataclass(frozen=True)
class Place:
    """One of our tensors: the `layer` that it belongs to, its `part` in there, and whether the layer is elastic."""

    layer: str
    part: str
    elastic: bool

    @property
    def role(self) -> str:
        """The last name of the layer, such as "depthwise"."""
        return self.layer.rpartition(".")[2]


def place_of(own: str, *, elastic: bool) -> Place:
    """Where one of our keys belongs, in a supernet (`elastic`) or a stand-alone subnet. The first block is not elastic.

    >>> place_of("blocks.3.depthwise.conv.kernel_transforms.7to5", elastic=True)
    Place(layer='blocks.3.depthwise', part='kernel_transforms.7to5', elastic=True)
    """
    parts = own.split(".")
    in_block = parts[0] == "blocks"
    n = 1 if not in_block else 4 if parts[2] == "squeeze" else 3
    inside = parts[n + 1 :] if parts[n] == "conv" else parts[n:]
    return Place(".".join(parts[:n]), ".".join(inside), elastic and in_block and parts[1] != "0")


def itself(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensor alone, at its key."""
    return {key: tensor}


def as_found(found: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor as it is."""
    return found[key]


def with_pooled_convolution(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensor alone. Our linear layer after pooling is a 1x1 convolution in published networks."""
    return {key: tensor[:, :, None, None] if key in POOLED_WEIGHTS else tensor}


def with_pooled_layer(found: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor. Inverse of `with_pooled_convolution`."""
    return found[key].flatten(1) if key in POOLED_WEIGHTS else found[key]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names in one kind of published file.

    Attributes:
        marks: parts of keys by which such files are recognised. They have all of them.
        block: name of the module between a block and its layers.
        layers: published names of our layers outside blocks.
        part: the published name of a part of a layer; None where the layout has none.
        order: our kinds of parts in the published order.
        of_quantizers: parts of the keys of quantizers' tensors.
        written: what is written for a tensor at its published key: the tensor, and beside it those that our networks do
            not have, with values that change nothing. On reading they are ignored.
        restored: our tensor for a published key of a file.
    """

    name: str
    marks: tuple[str, ...]
    block: str
    layers: Mapping[str, str]
    part: Callable[[Place], str | None]
    order: tuple[str, ...]
    of_quantizers: tuple[str, ...] = ()
    written: Callable[[str, Tensor], dict[str, Tensor]] = itself
    restored: Callable[[Mapping[str, Tensor], str], Tensor] = as_found

    def find(self, own: str, *, elastic: bool = True) -> str | None:
        """Published name of one of our keys, in a supernet (`elastic`) or a stand-alone subnet; None if it has none."""
        place = place_of(own, elastic=elastic)
        layer, part = self._layer(place), self.part(place)
        return None if layer is None or part is None else f"{layer}.{part}"

    def key(self, own: str, *, elastic: bool = True) -> str:
        """Like `find`. UserError for layers and quantizers that no network in this layout has."""
        key = self.find(own, elastic=elastic)
        if key is None:
            raise UserError(f"the published layout {self.name} has no place for {own}")
        return key

    def _layer(self, place: Place) -> str | None:
        first, *rest = place.layer.split(".")
        if first != "blocks":
            return self.layers.get(first)
        roles = {**ROLES, **SQUEEZE} if "pooled_mix_layer" in self.layers else ROLES
        return f"blocks.{rest[0]}.{self.block}.{roles[place.role]}" if place.role in roles else None

    def rank(self, own: str) -> int:
        """Position of one of our keys among those of its layer."""
        return self.order.index(place_of(own, elastic=True).part.partition(".")[0])

    def is_of_quantizer(self, key: str) -> bool:
        """Whether a published key belongs to a quantizer."""
        return any(part in key for part in self.of_quantizers)
