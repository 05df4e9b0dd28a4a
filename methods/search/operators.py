"""Search operators on gene matrices: functions of arrays and one random generator, from legal rows to legal rows."""

from __future__ import annotations

import numpy as np

from apq.genes import active, cardinalities, legalise, view
from apq.space import SearchSpace


def mutate(space: SearchSpace, genes: np.ndarray, probability: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy `(n, genes)` in which each gene of row i is redrawn with `probability[i]`.

    If the depth of a stage is redrawn, so are all its idle slots: a deeper stage gets random blocks, not defaults.
    """
    genes = genes.copy()
    redrawn = rng.random(genes.shape, dtype=np.float32) < probability[:, None]
    depths = view(space, redrawn).d[:, space.stage_of_slot]  # (n, slots)
    redrawn |= _of_slots(space, depths & ~active(space, genes))
    rows, columns = np.nonzero(redrawn)
    genes[rows, columns] = rng.integers(cardinalities(space)[columns])
    return legalise(space, genes, rng)


def crossover(
    space: SearchSpace, mothers: np.ndarray, fathers: np.ndarray, rng: np.random.Generator, father_prob: float = 0.5
) -> np.ndarray:
    """Children `(n, genes)` that take each gene from the father with `father_prob`, else from the mother.

    A slot that runs in one parent only comes from that parent.
    """
    swap = rng.random(mothers.shape, dtype=np.float32) < father_prob
    swap |= _of_slots(space, ~active(space, mothers))
    swap &= ~_of_slots(space, ~active(space, fathers))
    return legalise(space, np.where(swap, fathers, mothers), rng)


def blend(
    space: SearchSpace, genes: np.ndarray, target: np.ndarray, strength: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A copy `(n, genes)` in which each gene of row i becomes that of the target with probability `strength[i]`."""
    move = rng.random(genes.shape, dtype=np.float32) < strength[:, None]
    return legalise(space, np.where(move, target, genes), rng)


def _of_slots(space: SearchSpace, slots: np.ndarray) -> np.ndarray:
    """(n, genes) bool: the genes of the marked slots `(n, slots)`."""
    marked = np.zeros((len(slots), len(cardinalities(space))), dtype=bool)
    n_parts = 2 + len(space.operands)
    marked[:, : n_parts * len(space.slots)].reshape(len(slots), n_parts, -1)[:] = slots[:, None]
    return marked
