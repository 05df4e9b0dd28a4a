"""Random architectures of groups: any, shallow-fat, deep-slim (OQA, arXiv 2010.04354, section 4.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from apq.errors import UserError
from apq.genes import canonical, cardinalities, forbidden_slots, view, with_highest_bits
from apq.space import SearchSpace

Part = Literal["all", "lower", "upper"]  # of the choices, by rank


@dataclass(frozen=True, kw_only=True)
class Group:
    """Which part of the choices the architectures of a group are drawn from. `number` is part of their seed.

    The lower or upper part are two thirds of the choices: two of three. Resolutions are drawn from all.
    """

    name: str
    number: int
    depth: Part = "all"
    kernel: Part = "all"
    expansion: Part = "all"

    def words(self, space: SearchSpace) -> str:
        """The choices, in words."""
        depths = dict.fromkeys(_listed(stage.depths, self.depth) for stage in space.stages)
        kernels = _listed(space.kernel_sizes, self.kernel)
        if space.channel_step is None:
            expansions = "expansions " + _listed(space.ratios, self.expansion)
        else:
            expansions = f"{self.expansion} part of the mid channels"
        return f"{self.name}: depths {' or '.join(depths)}; kernels {kernels}; {expansions}"


@dataclass(frozen=True)
class Architectures:
    """Measured architectures of one group, with their MACs (`flops`), and their top-1 (0 to 1) in each supernet."""

    group: str
    depths: np.ndarray  # (n, stages)
    flops: np.ndarray  # (n,)
    top1: dict[str, np.ndarray]  # (n,) each


RANDOM = Group(name="random", number=0)
SHALLOW_FAT = Group(name="shallow-fat", number=1, depth="lower", kernel="upper", expansion="upper")
DEEP_SLIM = Group(name="deep-slim", number=2, depth="upper", kernel="lower", expansion="lower")


def part_of(count: int, part: Part) -> tuple[int, int]:
    """The first index of a part of so many ascending choices, and the one after its last.

    >>> part_of(3, "lower"), part_of(3, "upper"), part_of(2, "upper"), part_of(1, "lower")
    ((0, 2), (1, 3), (1, 2), (0, 1))
    """
    size = max(1, 2 * count // 3)
    return {"all": (0, count), "lower": (0, size), "upper": (count - size, count)}[part]


def draw(space: SearchSpace, group: Group, n: int, seed: int) -> np.ndarray:
    """(n, genes) random canonical rows of a group at the highest bits. The first ones do not depend on `n`.

    UserError where the rules of the space forbid one of its kernels at its highest bits.
    """
    counts = cardinalities(space)
    low, high = np.zeros_like(counts), counts.copy()
    parts = view(space, counts[None]), view(space, low[None]), view(space, high[None])
    for name, part in (("d", group.depth), ("ks", group.kernel), ("e", group.expansion)):
        of_count, of_low, of_high = (getattr(genes, name)[0] for genes in parts)
        for i, count in enumerate(of_count.tolist()):
            of_low[i], of_high[i] = part_of(count, part)
    genes = np.random.default_rng([seed, group.number]).integers(low, high, size=(n, len(counts)))
    genes = canonical(space, with_highest_bits(space, genes))
    if forbidden_slots(space, genes).any():
        raise UserError(f"the rules of space {space.name} forbid kernels at its highest bits, at which they are drawn")
    return genes


def in_space(genes: np.ndarray, space: SearchSpace, other: SearchSpace) -> np.ndarray:
    """The architectures (n, genes) of one space in another one of the same architectures, at its highest bits."""
    found = np.zeros((len(genes), len(cardinalities(other))), dtype=np.int64)
    theirs, ours = view(space, genes), view(other, found)
    for name in ("ks", "e", "d", "resolution"):
        getattr(ours, name)[:] = getattr(theirs, name)
    return with_highest_bits(other, found)


def _listed(choices: Sequence[float], part: Part) -> str:
    first, end = part_of(len(choices), part)
    return ", ".join(f"{choice:g}" for choice in choices[first:end])
