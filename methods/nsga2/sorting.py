"""Which candidates NSGA-II keeps and prefers: those of low non-dominated rank, then those with room around them."""

from __future__ import annotations

import numpy as np
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

_fronts = NonDominatedSorting().do  # moocore's compiled sorting
_crowding = get_crowding_function("cd").do


def survivors(losses: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best `n` of rows `(candidates, objectives)`, all to be minimised: their indices, ranks and crowding.

    Whole fronts enter, rank 0 first; of the front that no longer fits those with most room around them. Equal ones
    enter in the order of their rows, so that nothing here is random.

    >>> survivors(np.array([[0.0, 3.0], [2.0, 2.0], [1.0, 1.0], [3.0, 0.0]]), 4)[:2]
    (array([0, 2, 3, 1]), array([0, 0, 0, 1]))
    """
    kept, ranks, crowding = [], [], []
    for rank, front in enumerate(_fronts(losses, n_stop_if_ranked=n)):
        distance = _crowding(losses[front])
        left = n - sum(map(len, kept))
        if len(front) > left:
            roomiest = np.sort(np.argsort(-distance, kind="stable")[:left])
            front, distance = front[roomiest], distance[roomiest]
        kept.append(front)
        ranks.append(np.full(len(front), rank))
        crowding.append(distance)
    return np.concatenate(kept), np.concatenate(ranks), np.concatenate(crowding)


def tournament(ranks: np.ndarray, crowding: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) indices of winners of random pairs: the lower rank, of equal ranks the larger crowding distance."""
    one, other = rng.integers(len(ranks), size=(2, n))
    same = ranks[one] == ranks[other]
    loses = (ranks[other] < ranks[one]) | (same & (crowding[other] > crowding[one]))
    return np.where(loses, other, one)
