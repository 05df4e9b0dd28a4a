"""Survival and selection of NSGA-II: low non-dominated rank first, then large crowding distance."""

from __future__ import annotations

import numpy as np
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

_fronts = NonDominatedSorting().do  # moocore's compiled sorting
_crowding = get_crowding_function("cd").do


def survivors(losses: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices, ranks and crowding distances of the best `n` of rows `(candidates, objectives)`; lower is better.

    Whole fronts survive, from rank 0 on. Of the first front that does not fit, the rows with the largest crowding
    distance survive; equal ones in the order of their rows, so that nothing is random.

    >>> survivors(np.array([[0.0, 3.0], [2.0, 2.0], [1.0, 1.0], [3.0, 0.0]]), 4)[:2]
    (array([0, 2, 3, 1]), array([0, 0, 0, 1]))
    """
    kept, ranks, crowding = [], [], []
    for rank, front in enumerate(_fronts(losses, n_stop_if_ranked=n)):
        distance = _crowding(losses[front])
        left = n - sum(map(len, kept))
        if len(front) > left:
            least_crowded = np.sort(np.argsort(-distance, kind="stable")[:left])
            front, distance = front[least_crowded], distance[least_crowded]
        kept.append(front)
        ranks.append(np.full(len(front), rank))
        crowding.append(distance)
    return np.concatenate(kept), np.concatenate(ranks), np.concatenate(crowding)


def tournament(ranks: np.ndarray, crowding: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) indices of winners of random pairs, by lower rank, then by larger crowding distance."""
    one, other = rng.integers(len(ranks), size=(2, n))
    same = ranks[one] == ranks[other]
    loses = (ranks[other] < ranks[one]) | (same & (crowding[other] > crowding[one]))
    return np.where(loses, other, one)
