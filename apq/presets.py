"""The named spaces. A preset is a value: derive others with `dataclasses.replace`, or read one from JSON."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apq.bit_widths import BITS_SUFFIX, at_bits, bits_throughout
from apq.errors import UserError
from apq.files import read_json
from apq.operands import BLOCK_LAYERS, SHARED_LAYERS, Forbidden, OperandBits, SharedOperand
from apq.space import FULL_PRECISION, SearchSpace, space_from_dict
from apq.stages import Stage, make_divisible


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

# Small on purpose: digits are easy, and nearly every network of a larger space would reach 100 %.
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
    recipe="digits",
)

# For harder images than digits: wider in the later stages, where channels are cheap.
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
    recipe="glyphs",
)

# Photographs of clothes. BitFusion computes 2, 4 and 8 bits as they are. Few bits save much where layers are wide; 2
# bits in small depthwise layers cost more than 4, because they fill less of its array.
FASHION = replace(
    DIGITS,
    name="fashion",
    dataset="fashion",
    resolutions=(28,),
    stages=(
        Stage(width=8, stride=1, depths=(1, 2, 3)),
        Stage(width=16, stride=2, depths=(1, 2, 3)),
        Stage(width=24, stride=2, depths=(1, 2)),
    ),
    head_width=64,
    operands=_apq_operands((2, 4, 8)),
    forbidden=(),
    recipe="fashion",
)

# Widths of first convolution, first block, six stages and last 1x1, by the names that published networks use.
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
    """The space that the published network constructors describe. Their defaults give `apq-imagenet` and its recipe.

    `ratios` are the ends of a range with steps of 8 channels. The last stage has a single block. UserError for an
    unknown `base_stage_width`.
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
        mix_activation_bits=7,  # as the published weights were trained: 63 positive codes
        budget_scope="published",  # so that the published budgets (12.80 ms) keep their meaning
        recipe=None if suffix else "apq-imagenet",
    )


def _words(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


APQ_IMAGENET = published_space()  # APQ (CVPR 2020): ProxylessNAS widths, MobileNetV2-like strides


def _oqa_space(**fields: Any) -> SearchSpace:
    """OQA (arXiv 2010.04354): one bit-width throughout, first convolution and classifier in full precision."""
    space = SearchSpace(
        stem_stride=2,
        kernel_sizes=(3, 5, 7),
        ratios=(3.0, 4.0, 6.0),
        channel_step=None,
        operands=tuple(
            OperandBits(name=operand, layers=BLOCK_LAYERS, operand=operand, choices=(4,)) for operand in "wa"
        ),
        end_bits=FULL_PRECISION,
        **fields,
    )
    return replace(at_bits(space, 4), name=space.name)


_OQA_IMAGENET = {
    "dataset": "imagenet",
    "in_channels": 3,
    "n_classes": 1000,
    "resolutions": tuple(range(128, 225, 4)),
    "recipe": "oqa-imagenet",
}
_OQA_GLYPHS = {
    "dataset": "glyphs",
    "in_channels": 1,
    "n_classes": 62,
    "resolutions": (24, 28, 32),
    "recipe": "oqa-glyphs",
}
_MOBILENET_V3 = {  # as in MobileNetV3-large and the supernets of once-for-all, OQA and QFA over it
    "end_activation": "h_swish",
    "first_block_activation": "relu",
    "first_shortcut": True,
    "norm_eps": 1e-5,
}


def _stages(*rows: tuple[int, int, bool, str], depths: tuple[int, ...]) -> tuple[Stage, ...]:
    return tuple(Stage(width=w, stride=s, depths=depths, squeeze=se, activation=act) for w, s, se, act in rows)


OQA_MBV2 = _oqa_space(
    name="oqa-mbv2",
    **_OQA_IMAGENET,
    stem_width=32,
    first_block_width=16,
    stages=APQ_IMAGENET.stages,  # the widths of OQA's table 7
    head_width=1280,
)
OQA_MBV3 = _oqa_space(
    name="oqa-mbv3",
    **_OQA_IMAGENET,
    **_MOBILENET_V3,
    stem_width=16,
    first_block_width=16,
    stages=_stages(
        (24, 2, False, "relu"),
        (40, 2, True, "relu"),
        (80, 2, False, "h_swish"),
        (112, 1, True, "h_swish"),
        (160, 2, True, "h_swish"),
        depths=(2, 3, 4),
    ),
    head_width=960,
    pooled_width=1280,
)

# Small counterparts for glyphs, whose supernets train on a CPU.
OQA_MBV2_GLYPHS = _oqa_space(
    name="oqa-mbv2-glyphs",
    **_OQA_GLYPHS,
    stem_width=8,
    first_block_width=8,
    stages=_stages((8, 2, False, "relu6"), (16, 2, False, "relu6"), (24, 2, False, "relu6"), depths=(1, 2, 3)),
    head_width=64,
)
OQA_MBV3_GLYPHS = _oqa_space(
    name="oqa-mbv3-glyphs",
    **_OQA_GLYPHS,
    **_MOBILENET_V3,
    stem_width=8,
    first_block_width=8,
    stages=_stages((8, 2, False, "relu"), (16, 2, True, "relu"), (24, 2, True, "h_swish"), depths=(1, 2, 3)),
    head_width=64,
    pooled_width=96,
)


def widened(space: SearchSpace, width_mult: float) -> SearchSpace:
    """The space with all widths multiplied and rounded to multiples of 8, as once-for-all, OQA and QFA do it."""

    def times(width: int) -> int:
        return int(make_divisible(width * width_mult))

    return replace(
        space,
        stem_width=times(space.stem_width),
        first_block_width=times(space.first_block_width),
        stages=tuple(replace(stage, width=times(stage.width)) for stage in space.stages),
        head_width=times(space.head_width),
        pooled_width=None if space.pooled_width is None else times(space.pooled_width),
    )


def _qfa_space(oqa: SearchSpace, name: str, recipe: str) -> SearchSpace:
    """QFA (NeurIPS 2021, arXiv 2105.08952): OQA's networks, with the bits of every convolution chosen independently.

    The first convolution stays in full precision, the classifier has 8 bits, as in the published code. All other bits
    are searched, so `fixed_bits` has no effect.
    """
    choices = (2, 3, 4)
    return replace(
        oqa,
        name=name,
        recipe=recipe,
        operands=tuple(
            OperandBits(name=f"{layer}_{operand}", layers=(layer,), operand=operand, choices=choices)
            for layer, operand in itertools.product(BLOCK_LAYERS, "wa")
        ),
        shared_operands=tuple(
            SharedOperand(layer=layer, operand=operand, choices=choices)
            for layer, operand in itertools.product(SHARED_LAYERS, "wa")
        ),
        classifier_bits=8,
    )


QFA_WIDTH = 1.2
# Widths: 24 | 24 | 32, 48, 96, 136, 192 | 1152 | 1536.
QFA_MBV3 = _qfa_space(widened(OQA_MBV3, QFA_WIDTH), "qfa-mbv3", "qfa-imagenet")
QFA_MBV3_GLYPHS = _qfa_space(OQA_MBV3_GLYPHS, "qfa-mbv3-glyphs", "qfa-glyphs")

SPACES = {
    space.name: space
    for space in (
        DIGITS,
        GLYPHS,
        FASHION,
        APQ_IMAGENET,
        OQA_MBV2,
        OQA_MBV3,
        OQA_MBV2_GLYPHS,
        OQA_MBV3_GLYPHS,
        QFA_MBV3,
        QFA_MBV3_GLYPHS,
    )
}


def find_preset(name: str) -> SearchSpace | None:
    """The preset of this name, which may have the suffix of `at_bits`. None for other names."""
    if name in SPACES:
        return SPACES[name]
    suffix = BITS_SUFFIX.search(name)
    base = SPACES.get(name[: suffix.start()]) if suffix else None
    return at_bits(base, int(suffix[1])) if base else None


def get_space(name: str) -> SearchSpace:
    """The preset of this name, or the space in the JSON file at this path.

    OQA's presets may have a suffix for the bits: `oqa-mbv3-2bit`. UserError names the known ones.
    """
    if (preset := find_preset(name)) and (name in SPACES or bits_throughout(SPACES[BITS_SUFFIX.sub("", name)])):
        return preset
    if name.endswith(".json"):
        try:
            return space_from_dict(read_json(Path(name)))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    raise UserError(
        f"unknown space {name!r}; known: {', '.join(SPACES)}; those of OQA also with -2bit to -8bit appended; or give "
        "the path of a space in a .json file"
    )
