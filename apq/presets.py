"""The named spaces. A preset is a value: derive your own with `dataclasses.replace`, or load one from JSON."""

from __future__ import annotations

from pathlib import Path

from apq.errors import UserError
from apq.files import read_json
from apq.space import Forbidden, OperandBits, SearchSpace, Stage, space_from_dict


def _apq_operands(choices: tuple[int, ...]) -> tuple[OperandBits, ...]:
    """APQ's four operand kinds: a block's two pointwise layers share their bits."""
    pointwise = ("expand", "project")
    return (
        OperandBits(name="pw_w", layers=pointwise, operand="w", choices=choices),
        OperandBits(name="pw_a", layers=pointwise, operand="a", choices=choices),
        OperandBits(name="dw_w", layers=("depthwise",), operand="w", choices=choices),
        OperandBits(name="dw_a", layers=("depthwise",), operand="a", choices=choices),
    )


_NO_7X7_AT_4_BITS = Forbidden(
    kernel_size=7, operand="dw_a", bits=4, reason="the published cost table has no 7x7 depthwise with 4-bit activations"
)

# Small on purpose: handwritten digits are easy, and a space of which every network is perfect teaches nothing.
DIGITS = SearchSpace(
    name="digits",
    dataset="digits",
    in_channels=1,
    n_classes=10,
    resolutions=(32,),
    stem_width=8,
    stem_stride=2,
    first_block_width=8,
    stages=(
        Stage(width=8, stride=2, depths=(1, 2, 3)),
        Stage(width=8, stride=2, depths=(1, 2, 3)),
        Stage(width=16, stride=2, depths=(1, 2)),
    ),
    head_width=32,
    kernel_sizes=(3, 5, 7),
    ratios=(1.0, 4.0),
    channel_step=8,
    operands=_apq_operands((4, 6, 8)),
    forbidden=(_NO_7X7_AT_4_BITS,),
)

# APQ (CVPR 2020): ProxylessNAS widths, MobileNetV2-like strides. The last stage has a single block.
APQ_IMAGENET = SearchSpace(
    name="apq-imagenet",
    dataset="imagenet",
    in_channels=3,
    n_classes=1000,
    resolutions=(224,),
    stem_width=32,
    stem_stride=2,
    first_block_width=16,
    stages=(
        Stage(width=24, stride=2, depths=(2, 3, 4)),
        Stage(width=40, stride=2, depths=(2, 3, 4)),
        Stage(width=80, stride=2, depths=(2, 3, 4)),
        Stage(width=96, stride=1, depths=(2, 3, 4)),
        Stage(width=192, stride=2, depths=(2, 3, 4)),
        Stage(width=320, stride=1, depths=(1,)),
    ),
    head_width=1280,
    kernel_sizes=(3, 5, 7),
    ratios=(4.0, 6.0),
    channel_step=8,
    operands=_apq_operands((4, 6, 8)),
    forbidden=(_NO_7X7_AT_4_BITS,),
    mix_activation_bits=7,  # the published weights were trained so: 63 positive levels
    budget_scope="published",  # so that the published budgets (12.80 ms) keep their meaning
)

SPACES = {space.name: space for space in (DIGITS, APQ_IMAGENET)}


def get_space(name: str) -> SearchSpace:
    """The preset of this name, or the space in a JSON file of this path; UserError names the known ones."""
    if name in SPACES:
        return SPACES[name]
    if name.endswith(".json"):
        return space_from_dict(read_json(Path(name)))
    raise UserError(f"unknown space {name!r}; known: {', '.join(SPACES)}, or the path of a space in a .json file")
