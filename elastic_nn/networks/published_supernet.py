"""Published supernets: which space and which quantizers the weights in a file belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from apq.bit_widths import at_bits, bits_throughout
from apq.errors import UserError
from apq.files import Record
from apq.presets import OQA_MBV3, QFA_MBV3, QFA_WIDTH, published_space, widened
from apq.space import SearchSpace
from elastic_nn.networks.checkpoint_layout import published_state
from elastic_nn.networks.layout import Layout
from elastic_nn.networks.published_layouts import APQ, OQA
from elastic_nn.networks.qfa_layout import QFA
from elastic_nn.quantizers import FLOAT, LSQ, QuantScheme, scheme_named

OQA_NAME = re.compile(r"_b([2-8])$")  # published names of OQA's files end so: oqa_mbv3_d234_e346_k357_w1.0_b4
# The others are float. APQ's ranges are left out: its quantizers are added to float supernets, and calibrated.
SCHEMES = {OQA.name: LSQ, QFA.name: scheme_named("batchquant-published")}


class PublishedSupernet(NamedTuple):
    """The weights in a published file, the layout of their names, their space and their quantizers."""

    state: dict[str, Any]
    layout: Layout
    space: SearchSpace
    scheme: QuantScheme


def published_supernet(path: Path, data: Record, space: SearchSpace | None = None) -> PublishedSupernet:
    """What a published file holds. Its weights are not compared with the network yet.

    The space is `space`, or else `apq-imagenet`, `oqa-mbv3` or `qfa-mbv3` with the classes and widths of the weights.
    OQA's files do not hold their bits: without `space` they are those in the published name of the file. UserError
    where the file is none of them or its bits are not known.
    """
    state, layout = published_state(path, data)
    if layout.name == APQ.name:
        state = {key: value for key, value in state.items() if not layout.is_of_quantizer(key)}
    if space is None:
        try:
            space = _space_of(path.name, state, layout)
        except UserError as error:  # sizes that no space may have, too
            raise UserError(f"{path} is no published supernet that can be used: {error}") from error
    elif layout.name == OQA.name and bits_throughout(space) is None:
        raise UserError(f"{path} is a supernet of one bit-width (OQA): it is not of space {space.name}")
    return PublishedSupernet(state, layout, space, SCHEMES.get(layout.name, FLOAT))


def _space_of(name: str, state: Mapping[str, Any], layout: Layout) -> SearchSpace:
    """The space of the weights in a file of this name."""
    n_classes = len(state[layout.key("classifier.weight")])
    if layout.name == APQ.name:
        return published_space(n_classes)
    space = _of_width(layout, _width_mult(state, layout))
    if n_classes != space.n_classes:
        space = replace(space, name=f"{space.name}-n_classes-{n_classes}", n_classes=n_classes, recipe=None)
    if layout.name != OQA.name:
        return space
    if (named := OQA_NAME.search(name.removesuffix(".pth").removesuffix(".pt"))) is None:
        raise UserError(
            "it is one of OQA, and how many bits it has is not in it: write it with its space first, with "
            f"python -m elastic_nn.convert {name} --space oqa-mbv3-4bit --out FILE"
        )
    bits = int(named[1])
    return space if bits == space.fixed_bits else at_bits(space, bits)


def _of_width(layout: Layout, width_mult: float) -> SearchSpace:
    """The space of MobileNetV3's architectures with a width multiplier: a preset, or one that is named by its width."""
    own = QFA_MBV3 if layout.name == QFA.name else OQA_MBV3
    usual = QFA_WIDTH if own is QFA_MBV3 else 1.0
    if width_mult == usual:
        return own
    if width_mult == QFA_WIDTH and layout.name != OQA.name:
        return QFA_MBV3  # of once-for-all: QFA's training starts from it
    widths = widened(OQA_MBV3, width_mult)
    names = ("stem_width", "first_block_width", "stages", "head_width", "pooled_width")
    changed = {name: getattr(widths, name) for name in names}
    return replace(own, name=f"{own.name}-w{width_mult:g}", recipe=None, **changed)


def _width_mult(state: Mapping[str, Any], layout: Layout) -> float:
    """The width multiplier, from the width of the 1x1 layer after pooling. UserError where there is no such layer."""
    key = layout.key("pooled_mix_layer.weight")
    weight = state.get(key)
    if not isinstance(weight, Tensor) or weight.ndim != 4 or len(weight) == 0:
        raise UserError(f"{key} is missing or no convolution")
    return len(weight) / OQA_MBV3.pooled_width
