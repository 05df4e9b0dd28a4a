"""Spaces for tests: one small enough to enumerate, one with features that no preset has."""

from __future__ import annotations

import itertools

import numpy as np

from apq.genes import canonical, cardinalities, forbidden_slots
from apq.operands import BLOCK_LAYERS, Forbidden, OperandBits
from apq.presets import SPACES
from apq.space import SearchSpace, Stage

TINY = SearchSpace(
    name="tiny",
    dataset="digits",
    in_channels=1,
    n_classes=10,
    resolutions=(16, 24),
    stem_width=8,
    stem_stride=2,
    first_block_width=8,
    stages=(Stage(width=8, stride=2, depths=(1, 2)), Stage(width=16, stride=1, depths=(1,))),
    head_width=16,
    kernel_sizes=(3, 5),
    ratios=(1.0, 2.0),
    channel_step=8,
    operands=(
        OperandBits(name="w", layers=BLOCK_LAYERS, operand="w", choices=(4, 8)),
        OperandBits(name="a", layers=BLOCK_LAYERS, operand="a", choices=(4, 8)),
    ),
    forbidden=(Forbidden(kernel_size=5, operand="a", bits=4, reason="for the sake of the tests"),),
)

# Bits of every layer on their own, ratios rather than channel steps, three resolutions, a gap between depths, and a
# rule that joins the depthwise kernel to the bits of a pointwise layer.
WIDE = SearchSpace(
    name="wide",
    dataset="digits",
    in_channels=3,
    n_classes=5,
    resolutions=(32, 48, 64),
    stem_width=16,
    stem_stride=2,
    first_block_width=16,
    stages=(Stage(width=24, stride=2, depths=(1, 3)), Stage(width=40, stride=2, depths=(2, 3))),
    head_width=64,
    kernel_sizes=(3, 5, 7),
    ratios=(3.0, 4.0, 6.0),
    channel_step=None,
    operands=tuple(
        OperandBits(name=f"{layer}_{operand}", layers=(layer,), operand=operand, choices=(2, 3, 4))
        for layer, operand in itertools.product(BLOCK_LAYERS, "wa")
    ),
    forbidden=(
        Forbidden(kernel_size=3, operand="expand_w", bits=2, reason="for the sake of the tests"),
        Forbidden(kernel_size=7, operand="depthwise_a", bits=2, reason="for the sake of the tests"),
    ),
)

ALL = {**SPACES, TINY.name: TINY, WIDE.name: WIDE}
CHOOSING_BITS = {name: space for name, space in ALL.items() if any(len(kind.choices) > 1 for kind in space.operands)}


def every_row(space: SearchSpace) -> np.ndarray:
    """(networks, genes) all legal canonical rows of a small space, by brute force."""
    rows = np.array(list(itertools.product(*(range(n) for n in cardinalities(space)))))
    rows = np.unique(canonical(space, rows), axis=0)
    return rows[~forbidden_slots(space, rows).any(axis=1)]


def made_up(space, seed=0):
    """A top-1 that grows with every gene and differs between all subnets."""
    worth = np.random.default_rng(seed).uniform(0.1, 1, len(cardinalities(space)))
    return lambda genes: 0.2 + 0.6 * np.tanh(genes @ worth / worth.sum())


def brute_force_front(costs, values):
    points = set(zip(costs.tolist(), values.tolist(), strict=True))
    return {(c, v) for c, v in points if not any(c2 <= c and v2 >= v and (c2, v2) != (c, v) for c2, v2 in points)}
