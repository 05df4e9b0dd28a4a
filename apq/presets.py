"""The named spaces. A preset is a value: derive your own with `dataclasses.replace`, or load one from JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from apq.errors import UserError
from apq.files import read_json
from apq.rounding import make_divisible
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

# For images that are harder than digits: wider in the later stages, where a channel is cheap.
GLYPHS = replace(
    DIGITS,
    name="glyphs",
    dataset="glyphs",
    n_classes=62,
    stages=(
        Stage(width=8, stride=2, depths=(1, 2, 3)),
        Stage(width=16, stride=2, depths=(1, 2, 3)),
        Stage(width=24, stride=2, depths=(1, 2)),
    ),
    head_width=64,
)

# First convolution, first block, six stages, last 1x1: the two width tables that published networks name.
PUBLISHED_WIDTHS = {
    "proxyless": (32, 16, 24, 40, 80, 96, 192, 320, 1280),
    "google": (32, 16, 24, 32, 64, 96, 160, 320, 1280),  # MobileNetV2 (CVPR 2018), table 2
}
PUBLISHED_STRIDES = (2, 2, 2, 1, 2, 1)


def published_space(
    n_classes: int = 1000,
    base_stage_width: str = "proxyless",
    width_mult: float = 1.0,
    kernel_sizes: Sequence[int] = (3, 5, 7),
    ratios: Sequence[float] = (4, 6),
    depths: Sequence[int] = (2, 3, 4),
) -> SearchSpace:
    """The space that the published network constructors describe; their defaults give `apq-imagenet`.

    `ratios` are the ends of a range walked in steps of 8 channels. The last stage has a single block.
    """
    if base_stage_width not in PUBLISHED_WIDTHS:
        raise UserError(f"base_stage_width {base_stage_width!r}; known: {', '.join(PUBLISHED_WIDTHS)}")
    stem, first, *stages, head = (
        int(make_divisible(width * width_mult)) for width in PUBLISHED_WIDTHS[base_stage_width]
    )
    choices = tuple(sorted(depths))
    changed = {
        "n_classes": n_classes if n_classes != 1000 else None,
        "width": base_stage_width if base_stage_width != "proxyless" else None,
        "width_mult": width_mult if width_mult != 1.0 else None,
        "ks": kernel_sizes if sorted(kernel_sizes) != [3, 5, 7] else None,
        "e": ratios if [min(ratios), max(ratios)] != [4, 6] else None,
        "d": depths if choices != (2, 3, 4) else None,
    }
    suffix = "".join(f"-{key}-{_words(value)}" for key, value in changed.items() if value is not None)
    return SearchSpace(
        name=f"apq-imagenet{suffix}",
        dataset="imagenet",
        in_channels=3,
        n_classes=n_classes,
        resolutions=(224,),
        stem_width=stem,
        stem_stride=2,
        first_block_width=first,
        stages=tuple(
            Stage(width=width, stride=stride, depths=choices if i < len(stages) - 1 else (1,))
            for i, (width, stride) in enumerate(zip(stages, PUBLISHED_STRIDES, strict=True))
        ),
        head_width=head if width_mult > 1 else PUBLISHED_WIDTHS[base_stage_width][-1],
        kernel_sizes=tuple(sorted(kernel_sizes)),
        ratios=tuple(float(ratio) for ratio in sorted({min(ratios), max(ratios)})),
        channel_step=8,
        operands=_apq_operands((4, 6, 8)),
        forbidden=(_NO_7X7_AT_4_BITS,),
        mix_activation_bits=7,  # the published weights were trained so: 63 positive levels
        budget_scope="published",  # so that the published budgets (12.80 ms) keep their meaning
    )


def _words(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


APQ_IMAGENET = published_space()  # APQ (CVPR 2020): ProxylessNAS widths, MobileNetV2-like strides

SPACES = {space.name: space for space in (DIGITS, GLYPHS, APQ_IMAGENET)}


def get_space(name: str) -> SearchSpace:
    """The preset of this name, or the space in a JSON file of this path; UserError names the known ones."""
    if name in SPACES:
        return SPACES[name]
    if name.endswith(".json"):
        try:
            return space_from_dict(read_json(Path(name)))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    raise UserError(f"unknown space {name!r}; known: {', '.join(SPACES)}, or the path of a space in a .json file")
