"""Which of the candidates that a search proposes are measured: promising ones and uncertain ones, at all costs.

As in searches with surrogates (MSuNAS, NSGANetV2), the measured ones cover the whole range of costs: one for each band.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from apq.files import Record

APART = 3  # genes in which a measured candidate differs from the others, where such a candidate is left


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Candidates of a search: genes (n, genes), and the cost (n,) that the budget limits. `history` is the search's.

    `first` is the row that the search would choose now, which is measured in any case (None: it would choose none).
    """

    genes: np.ndarray
    costs: np.ndarray
    history: Sequence[Record] = ()
    first: int | None = None

    def __len__(self) -> int:
        return len(self.genes)

    def take(self, rows: np.ndarray) -> Pool:
        """These rows of the pool."""
        place = np.flatnonzero(rows == self.first) if self.first is not None else ()
        first = int(place[0]) if len(place) else None
        return replace(self, genes=self.genes[rows], costs=self.costs[rows], first=first)


def gains(predicted: np.ndarray, costs: np.ndarray, top1: np.ndarray, paid: np.ndarray) -> np.ndarray:
    """(n,) how far accuracies `predicted` (n,) at `costs` (n,) are above the best measured one of no higher cost.

    `top1` (m,) and `paid` (m,) are measured accuracies and their costs. Where nothing measured is as cheap, they are
    compared with the least accurate one.

    >>> gains(np.array([0.5, 0.75]), np.array([1.0, 3.0]), np.array([0.25, 0.125]), np.array([2.0, 3.0]))
    array([0.375, 0.5  ])
    """
    order = np.argsort(paid, kind="stable")
    best = np.append(top1.min(), np.maximum.accumulate(top1[order])) if len(top1) else np.zeros(1)
    return predicted - best[np.searchsorted(paid[order], costs, side="right")]


def bands_of_costs(costs: np.ndarray, n: int) -> np.ndarray:
    """(n,) the band of each cost, of `n` bands that are equally wide in the logarithm.

    >>> bands_of_costs(np.array([1.0, 2.0, 60.0, 100.0]), 2)
    array([0, 0, 1, 1])
    """
    logs = np.log(np.maximum(costs, np.finfo(float).tiny))
    width = (logs.max() - logs.min()) / n
    return np.minimum((logs - logs.min()) / width, n - 1).astype(int) if width else np.zeros(len(costs), dtype=int)


def choose(
    genes: np.ndarray,
    gain: np.ndarray,
    spread: np.ndarray,
    bands: np.ndarray,
    n: int,
    turn: int = 0,
    first: int | None = None,
) -> np.ndarray:
    """(up to n,) rows of the candidates (m, genes) to measure, all different.

    The bands (m,) take turns, and in each band the highest `gain` (m,) and the largest `spread` (m,). Which of the two
    is first alternates from band to band, beginning by `turn`. They are `APART` from each other while there are such.
    Row `first` is chosen before all others, if it is given.
    """
    chosen: list[int] = []
    apart = np.full(len(genes), genes.shape[1] + 1)  # genes in which each differs from the nearest chosen one
    if first is not None and n:
        chosen.append(first)
        apart = (genes != genes[first]).sum(axis=1)
    labels = np.unique(bands)
    for step in range(2 * n * max(1, len(labels))):
        band, visit = step % max(1, len(labels)), step // max(1, len(labels))
        if len(chosen) == n or not apart.any():
            break
        free = (bands == labels[band]) & (apart > 0)
        free &= (apart >= APART) if (free & (apart >= APART)).any() else True
        if free.any():
            worth = (gain, spread)[(turn + band + visit) % 2]
            best = int(np.argmax(np.where(free, worth, -np.inf)))
            chosen.append(best)
            apart = np.minimum(apart, (genes != genes[best]).sum(axis=1))
    return np.array(chosen, dtype=int)
