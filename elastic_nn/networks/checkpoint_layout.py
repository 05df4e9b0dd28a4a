"""The map between our keys and those of published checkpoints.

Published supernets wrap elastic layers in one more module (`conv.conv`, `bn.bn`). Their other layers and published
stand-alone subnets have no such wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apq.checkpoint import check_fit
from apq.errors import UserError
from elastic_nn.networks.foreign_weights import unwrapped, without_prefix
from elastic_nn.quantizers.functional import LARGEST_CLIP

ROLES = {"expand": "inverted_bottleneck", "depthwise": "depth_conv", "project": "point_linear"}
RANGES = ("activation_range", "weight_range")
# Published first convolutions have a range for an input that they never quantize; ours have none.
RAW_INPUT_RANGE = "first_conv.conv.activation_range"
CLASSIFIER = "classifier.linear.weight"


def published_state(path: Path, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in a published file, see `unwrapped`. UserError if they are not those of a network."""
    state = unwrapped(data)
    state = without_prefix(state) if isinstance(state, dict) else {}
    if not isinstance(state.get(CLASSIFIER), Tensor) or state[CLASSIFIER].ndim != 2:
        raise UserError(f"{path} is neither one of this project's networks nor a published one: it has no {CLASSIFIER}")
    return state


def published_key(key: str, *, elastic: bool) -> str:
    """The published name of one of our keys, in a supernet (`elastic`) or a stand-alone subnet.

    >>> published_key("blocks.3.depthwise.norm.weight", elastic=True)
    'blocks.3.mobile_inverted_conv.depth_conv.bn.bn.weight'
    >>> published_key("blocks.3.depthwise.conv.kernel_transforms.7to5", elastic=True)
    'blocks.3.mobile_inverted_conv.depth_conv.conv.7to5_matrix'

    UserError for layers and quantizers that no published network has.
    """
    parts, twice = key.split("."), False
    other_quantizer = {"weight_quant", "act_quant"} & set(parts) and parts[-1] != "range"
    if other_quantizer or parts[0] == "pooled_mix_layer" or (parts[0] == "blocks" and parts[2] not in ROLES):
        raise UserError(f"the published layout has no place for {key}")
    if parts[0] == "blocks":
        twice = elastic and parts[1] != "0"  # the first block is not elastic
        parts = [*parts[:2], "mobile_inverted_conv", ROLES[parts[2]], *parts[3:]]
    elif parts[0] == "classifier":
        parts = ["classifier", "linear", *parts[1:]]
    tail = ".".join(parts[-2:])
    if parts[-2] == "kernel_transforms":
        return ".".join([*parts[:-2], f"{parts[-1]}_matrix"])
    if tail in ("act_quant.range", "weight_quant.range"):
        return ".".join([*parts[:-2], "activation_range" if parts[-2] == "act_quant" else "weight_range"])
    if parts[-2] == "norm":
        return ".".join([*parts[:-2], *(["bn", "bn"] if twice else ["bn"]), parts[-1]])
    return ".".join([*parts[:-1], *(["conv"] if twice else []), parts[-1]])


def to_published(net: nn.Module, *, elastic: bool = True) -> dict[str, Tensor]:
    """The weights of a network under their published names, in the published order."""
    named = {published_key(key, elastic=elastic): tensor for key, tensor in net.state_dict().items()}
    if "first_conv.conv.weight_range" in named:
        named[RAW_INPUT_RANGE] = torch.full((1,), LARGEST_CLIP)
    order = {"activation_range": 0, "weight_range": 1}
    modules: dict[str, list[str]] = {}
    for key in named:
        modules.setdefault(_module_of(key), []).append(key)
    inside = {module: sorted(keys, key=lambda key: _rank(key, order)) for module, keys in modules.items()}
    return {key: named[key] for keys in inside.values() for key in keys}


def from_published(state: Mapping[str, Any], net: nn.Module, *, elastic: bool = True) -> dict[str, Tensor]:
    """Published weights under the names of `net`.

    They must have exactly its keys and shapes; those of a float network may lack all ranges. UserError names the first
    keys that are missing, extra or misshapen.
    """
    found = without_prefix(state)
    ours = {published_key(key, elastic=elastic): key for key in net.state_dict()}
    if not any(key.endswith(RANGES) for key in found):
        ours = {key: own for key, own in ours.items() if not key.endswith(RANGES)}
    weights = net.state_dict()
    expected = {key: weights[own] for key, own in ours.items()}
    if RAW_INPUT_RANGE in found:
        expected[RAW_INPUT_RANGE] = torch.zeros(1)
    check_fit(found, expected)
    return {own: found[key] for key, own in ours.items()}


def _module_of(key: str) -> str:
    """The convolution, norm or classifier that a published key belongs to."""
    parts = key.split(".")
    for stem in ("bn", "conv", "linear"):
        if stem in parts[:-1]:
            return ".".join(parts[: parts.index(stem) + 1])
    return ".".join(parts[:-1])


def _rank(key: str, order: Mapping[str, int]) -> int:
    name = key.rsplit(".", 1)[-1]
    return order.get(name, 2 if name.endswith("_matrix") else 3)
