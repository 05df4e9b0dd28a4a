"""The layouts of published checkpoints, and which of them a file or a network has.

Published supernets wrap the convolution and the norm of an elastic layer in one more module (`conv.conv`, `bn.bn`).
Their other layers and published stand-alone subnets have no such wrapper.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from apq.errors import UserError
from elastic_nn.networks.layout import (
    MBV2_LAYERS,
    MBV3_LAYERS,
    ROLES,
    Layout,
    Place,
    with_pooled_convolution,
    with_pooled_layer,
)
from elastic_nn.networks.qfa_layout import QFA
from elastic_nn.quantizers.functional import LARGEST_CLIP

RANGES = {"act_quant.range": "activation_range", "weight_quant.range": "weight_range"}  # of APQ's quantizers
STEPS = {"act_quant.step": "sa", "weight_quant.step": "sw"}  # of OQA's
BLOCK_NAMES = ("mobile_inverted_conv", "conv")  # of older code and files, and of newer


def _part(place: Place) -> str | None:
    kind, _, rest = place.part.partition(".")
    twice = place.elastic and place.role in ROLES
    if kind == "kernel_transforms":
        return f"conv.{rest}_matrix"
    if kind == "norm":
        return f"bn.bn.{rest}" if twice else f"bn.{rest}"
    if kind not in ("weight", "bias"):
        return None
    if ".squeeze." in place.layer:
        return kind
    return f"linear.{kind}" if place.layer == "classifier" else f"conv.conv.{kind}" if twice else f"conv.{kind}"


def _part_with_ranges(place: Place) -> str | None:
    stem = "linear" if place.layer == "classifier" else "conv"
    return f"{stem}.{RANGES[place.part]}" if place.part in RANGES else _part(place)


def _part_with_steps(place: Place) -> str | None:
    if place.part not in STEPS or place.layer == "classifier":
        return _part(place)
    return f"conv.conv.{STEPS[place.part]}" if place.elastic else f"conv.{STEPS[place.part]}"


def _with_raw_input_range(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """APQ's first convolutions have a range for an input that they never quantize; ours have none."""
    raw = {"first_conv.conv.activation_range": torch.full((1,), LARGEST_CLIP)}
    return {**raw, key: tensor} if key == "first_conv.conv.weight_range" else {key: tensor}


APQ = Layout(
    name="apq",
    marks=("classifier.linear.weight",),
    block="mobile_inverted_conv",
    layers=MBV2_LAYERS,
    part=_part_with_ranges,
    order=("act_quant", "weight_quant", "kernel_transforms", "weight", "bias", "norm"),
    of_quantizers=tuple(RANGES.values()),
    written=_with_raw_input_range,
)
OFA = Layout(  # mit-han-lab/once-for-all f03b267, `OFAMobileNetV3`; its released files have the older name of blocks
    name="ofa-mbv3",
    marks=("final_expand_layer.",),
    block="conv",
    layers=MBV3_LAYERS,
    part=_part,
    order=("kernel_transforms", "weight", "bias", "norm"),
    written=with_pooled_convolution,
    restored=with_pooled_layer,
)
OQA = Layout(  # LaVieEnRoseSMZ/OQA 99cd181, `OFALSQMobileNetV3`, for 4, 3 and 2 bits alike
    name="oqa-mbv3",
    marks=("final_expand_layer.", ".sw"),
    block="mobile_inverted_conv",
    layers=MBV3_LAYERS,
    part=_part_with_steps,
    order=("kernel_transforms", "weight", "bias", "act_quant", "weight_quant", "norm"),
    of_quantizers=tuple(f".{name}" for name in STEPS.values()),
    written=with_pooled_convolution,
    restored=with_pooled_layer,
)
LAYOUTS = {layout.name: layout for layout in (APQ, OFA, OQA, QFA)}


def layout_of_file(keys: Collection[str]) -> Layout | None:
    """The layout of a published file with these keys: the last one whose marks it has; None if it is none of them."""
    fitting = [layout for layout in LAYOUTS.values() if all(any(m in key for key in keys) for m in layout.marks)]
    if not fitting:
        return None
    layout = fitting[-1]
    names = [name for name in BLOCK_NAMES if any(key.startswith(f"blocks.0.{name}.") for key in keys)]
    return replace(layout, block=names[0]) if names else layout


def layout_of_network(net: nn.Module, *, elastic: bool = True) -> Layout:
    """The layout in which published code would write a supernet (`elastic`) or a stand-alone subnet.

    UserError for networks that no published code has, which names a tensor.
    """
    misfits = {}
    for layout in LAYOUTS.values():
        misfits[layout.name] = [key for key in net.state_dict() if layout.find(key, elastic=elastic) is None]
        if not misfits[layout.name]:
            return layout
    name, keys = min(misfits.items(), key=lambda item: len(item[1]))
    raise UserError(f"no published layout fits this network: {name} has no place for {keys[0]}")
