"""Layouts of the features of accuracy predictors: APQ's, or QFA's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apq.genes import cardinalities
from apq.operands import BLOCK_LAYERS, SHARED_LAYERS
from apq.space import SearchSpace

BLOCK_BITS = 2 * len(BLOCK_LAYERS)  # bits of a block: weights and activations of each layer
UNUSED = 2  # of these for the first block, which has no expand layer


@dataclass(frozen=True)
class Section:
    """Consecutive features, `width` of them.

    Kinds: "choice" is gene `column` as a one-hot; "depth" is the depth of a stage, with gene `column`, as that number
    of leading ones; "unused" is a one in the last place.
    """

    kind: str
    column: int
    width: int


def layout_of(space: SearchSpace) -> tuple[list[Section], list[Section]]:
    """The sections of the architecture half and of the policy half.

    APQ's layout: kernels and mid channels of all slots, the resolution if there are several; bits of all slots, one
    operand kind after the other, then those of shared operands. QFA's layout, for spaces with its choices: kernels, mid
    channels, depths, resolution; bits of the first block, of all slots, of the last layers.
    """
    counts, slots, kinds, stages = cardinalities(space), len(space.slots), len(space.operands), len(space.stages)
    per_slot = (2 + kinds) * slots
    widths, bits = np.arange(2 * slots), np.arange(2 * slots, per_slot)
    depths, shared = np.split(np.arange(per_slot, len(counts) - 1), [stages])
    resolution = len(counts) - 1

    def choices(columns: np.ndarray | list[int]) -> list[Section]:
        return [Section("choice", int(column), int(counts[column])) for column in columns]

    if not chooses_as_qfa(space):
        several = [resolution] if len(space.resolutions) > 1 else []
        return choices(widths) + choices(several), choices(bits) + choices(shared)
    of_first = BLOCK_BITS - UNUSED
    unused = [Section("unused", -1, len(space.operands[0].choices))] * UNUSED
    of_depths = [
        Section("depth", int(column), stage.depths[-1]) for column, stage in zip(depths, space.stages, strict=True)
    ]
    by_slot = bits.reshape(kinds, slots).T.ravel()
    return (
        choices(widths) + of_depths + choices([resolution]),
        unused + choices(shared[:of_first]) + choices(by_slot) + choices(shared[of_first:]),
    )


def chooses_as_qfa(space: SearchSpace) -> bool:
    """Whether a space has QFA's choices: whole expansions, and the same bits for every operand of every layer."""
    layers = [(layer, operand) for layer in SHARED_LAYERS for operand in "wa"]
    kinds = [((layer,), operand) for layer in BLOCK_LAYERS for operand in "wa"]
    return (
        [(shared.layer, shared.operand) for shared in space.shared_operands] == layers
        and [(kind.layers, kind.operand) for kind in space.operands] == kinds
        and len({operand.choices for operand in (*space.operands, *space.shared_operands)}) == 1
        and space.channel_step is None
        and all(ratio == int(ratio) for ratio in space.ratios)
    )
