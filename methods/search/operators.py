"""Search operators on gene matrices: functions of arrays and one random generator, from legal rows to legal rows."""

from __future__ import annotations

import numpy as np

from apq.genes import active, cardinalities, chosen, of_slots, settled, view
from apq.space import SearchSpace


def mutate(space: SearchSpace, genes: np.ndarray, probability: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy `(n, genes)` in which each gene of row i is redrawn with `probability[i]`.

    If the depth of a stage is redrawn, so are all its idle slots: a deeper stage gets random blocks, not defaults.
    """
    redrawn = _happens(genes.shape, probability, rng)
    depths = view(space, redrawn).d.take(space.stage_of_slot, axis=1)  # (n, slots)
    fresh = of_slots(space, depths & ~active(space, genes))
    redrawn[:, : fresh.shape[1]] |= fresh
    cells = np.flatnonzero(redrawn)
    genes = genes.copy()
    genes.put(cells, rng.integers(cardinalities(space).take(cells % genes.shape[1])))
    return settled(space, genes, rng)


def crossover(
    space: SearchSpace, mothers: np.ndarray, fathers: np.ndarray, rng: np.random.Generator, father_prob: float = 0.5
) -> np.ndarray:
    """Children `(n, genes)` that take each gene from the father with `father_prob`, else from the mother.

    A slot that runs in one parent only comes from that parent.
    """
    swap = _happens(mothers.shape, np.full(len(mothers), father_prob), rng)
    mother_runs, father_runs = (of_slots(space, active(space, genes)) for genes in (mothers, fathers))
    of_slot = swap[:, : mother_runs.shape[1]]
    of_slot |= ~mother_runs
    of_slot &= father_runs
    return settled(space, chosen(swap, fathers, mothers), rng)


def blend(
    space: SearchSpace, genes: np.ndarray, target: np.ndarray, strength: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A copy `(n, genes)` in which each gene of row i becomes that of the target with probability `strength[i]`."""
    move = _happens(genes.shape, strength, rng)
    return settled(space, chosen(move, target.astype(genes.dtype), genes), rng)


def _happens(shape: tuple[int, int], probability: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`shape` bool: true with `probability[i]` in row i.

    A random byte decides unless it ties with the probability in 256ths. Then a fraction decides, so that the
    probability is exact. Where all probabilities are 1/2 a random bit decides.
    """
    rows, columns = shape
    if (probability == 0.5).all():
        draws = np.frombuffer(rng.bytes(rows * -(-columns // 8)), dtype=np.uint8).reshape(rows, -1)
        return np.unpackbits(draws, axis=1, count=columns).view(bool)
    whole = np.minimum(np.floor(256 * probability), 255)
    draws = np.frombuffer(rng.bytes(rows * columns), dtype=np.uint8).reshape(shape)
    limits = whole.astype(np.uint8)[:, None]
    happens, ties = draws < limits, np.flatnonzero(draws == limits)
    happens.put(ties, rng.random(len(ties)) < (256 * probability - whole).take(ties // columns))
    return happens
