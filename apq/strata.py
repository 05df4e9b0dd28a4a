"""Random gene matrices in strata: rows at full resolution, at full depth, with one bit-width for all layers.

QFA (arXiv 2105.08952; in its published code) draws the pairs of its predictor so. Uniform choices hardly ever give the
corners of a space, which a search goes to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apq.bounds import is_number
from apq.errors import UserError
from apq.genes import canonical, cardinalities, forbidden_slots, legalise, view
from apq.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class PairStrata:
    """Chances of a pair, independent of each other, to be in each stratum. The defaults are those of QFA's code.

    A pair in a stratum may also be there by chance. UserError where a chance is not between 0 and 1.
    """

    full_resolution: float = 0.4
    full_depth: float = 0.3  # in every stage
    one_bit_width: float = 0.3

    def __post_init__(self) -> None:
        for name, chance in vars(self).items():
            if not is_number(chance, 0, 1):
                raise UserError(f"strata of pairs: {name} {chance!r} is not a chance from 0 to 1")


def draw_in_strata(
    space: SearchSpace, n: int, strata: PairStrata, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Legal canonical rows (n, genes), and (n, 3) bool: the strata that each was drawn in, in the order of the fields.

    All other choices are uniform. One bit-width is one of `common_bits`, for the layers of the slots that run and for
    shared operands; in a space that has none the stratum is empty.
    """
    chances = np.array([strata.full_resolution, strata.full_depth, strata.one_bit_width])
    common = common_bits(space)
    chances[2] *= bool(common)
    drawn = rng.random((n, 3)) < chances
    counts = cardinalities(space)
    genes = rng.integers(counts, size=(n, len(counts)))
    parts, most = view(space, genes), view(space, counts[None])
    parts.resolution[drawn[:, 0]] = most.resolution - 1
    parts.d[drawn[:, 1]] = most.d - 1
    bits = rng.integers(max(1, len(common)), size=n)
    for i, width in enumerate(common):
        rows = np.flatnonzero(drawn[:, 2] & (bits == i))
        for k, kind in enumerate(space.operands):
            parts.bits[rows, k] = kind.choices.index(width)
        for k, shared in enumerate(space.shared_operands):
            parts.shared_bits[rows, k] = shared.choices.index(width)
        genes[rows] = _withlegal_kernels(space, genes[rows], width, rng)
    return legalise(space, genes, rng), drawn


def common_bits(space: SearchSpace) -> tuple[int, ...]:
    """The bit-widths that every operand kind and every shared operand offers, and that some kernel may have."""
    choices = [set(kind.choices) for kind in (*space.operands, *space.shared_operands)]
    return tuple(b for b in sorted(set.intersection(*choices)) if len(legal_kernels(space, b)))


def legal_kernels(space: SearchSpace, bits: int) -> np.ndarray:
    """The kernel genes of blocks whose bits are all `bits`."""
    everywhere = (bits,) * len(space.operands)
    return np.array([i for i, k in enumerate(space.kernel_sizes) if space.broken_rule(k, everywhere) is None])


def _withlegal_kernels(space: SearchSpace, genes: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    """A canonical copy of rows of one bit-width in which forbidden kernels are drawn again among the legal ones."""
    genes, legal = canonical(space, genes), legal_kernels(space, bits)
    rows, slots = np.nonzero(forbidden_slots(space, genes))
    view(space, genes).ks[rows, slots] = legal[rng.integers(len(legal), size=len(rows))]
    return genes
