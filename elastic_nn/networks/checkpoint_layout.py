"""The map between our keys and those of published checkpoints, by the layouts of `published_layouts`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apq.checkpoint import check_fit
from apq.errors import UserError
from elastic_nn.modules.quant_layers import quantizer_keys
from elastic_nn.networks.foreign_weights import unwrapped, without_prefix
from elastic_nn.networks.layout import Layout, place_of
from elastic_nn.networks.published_layouts import APQ, layout_of_file, layout_of_network


def published_state(path: Path, data: Mapping[str, Any]) -> tuple[dict[str, Any], Layout]:
    """The weights in a published file, see `unwrapped`, and their layout.

    UserError if they are not those of a network.
    """
    state = unwrapped(data)
    state = without_prefix(state) if isinstance(state, dict) else {}
    layout = layout_of_file(state) or APQ
    classifier = state.get(key := layout.key("classifier.weight"))
    if not isinstance(classifier, Tensor) or classifier.ndim != 2:
        raise UserError(f"{path} is neither one of this project's networks nor a published one: it has no {key}")
    return state, layout


def to_published(net: nn.Module, *, elastic: bool = True) -> dict[str, Tensor]:
    """The weights of a network under their published names, in the published order.

    `elastic` says that it is a supernet. UserError for networks that no published code has.
    """
    layout, weights = layout_of_network(net, elastic=elastic), net.state_dict()
    layers = list(dict.fromkeys(place_of(own, elastic=elastic).layer for own in weights))

    def position(own: str) -> tuple[int, int]:
        return layers.index(place_of(own, elastic=elastic).layer), layout.rank(own)

    written = {}
    for own in sorted(weights, key=position):
        written |= layout.written(layout.key(own, elastic=elastic), weights[own])
    return written


def from_published(
    state: Mapping[str, Any], net: nn.Module, layout: Layout | None = None, *, elastic: bool = True
) -> dict[str, Tensor]:
    """Published weights under the names of `net`, in a given layout, or else in the one that they have.

    They must have exactly its keys and shapes. Those of a float network lack all that belongs to quantizers, and so
    does the result. UserError names the first keys that are missing, extra or misshapen.
    """
    found = without_prefix(state)
    layout = layout or layout_of_file(found) or layout_of_network(net, elastic=elastic)
    weights = net.state_dict()
    if not any(layout.is_of_quantizer(key) for key in found):
        of_quantizers = quantizer_keys(net)
        weights = {own: tensor for own, tensor in weights.items() if own not in of_quantizers}
    ours = {layout.key(own, elastic=elastic): own for own in weights}
    expected: dict[str, Tensor] = {}
    for key, own in ours.items():
        expected |= layout.written(key, weights[own])
    beside = expected.keys() - ours.keys()
    expected = {key: tensor for key, tensor in expected.items() if key in ours or (key in found and tensor.numel())}
    check_fit({key: value for key, value in found.items() if key in expected or key not in beside}, expected)
    return {own: layout.restored(found, key) for key, own in ours.items()}
