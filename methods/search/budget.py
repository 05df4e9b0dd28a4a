"""A budget, and how to find candidates inside it even where random ones never are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from apq.errors import UserError
from apq.genes import canonical, cardinalities, sample
from apq.space import SearchSpace
from methods.search.operators import blend

MOST_PROPOSALS = 4  # in one round, for every candidate wanted


@dataclass(frozen=True, kw_only=True)
class Budget:
    """At most `limit` of what `cost` counts: genes `(n, genes)` -> costs `(n,)`, in `unit`."""

    cost: Callable[[np.ndarray], np.ndarray]
    limit: float
    unit: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise UserError(f"the constraint must be a positive number, not {self.limit}")

    def __str__(self) -> str:
        return f"{self.limit:g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Seen:
    """Candidates met so far, as sorted 64-bit keys of their rows.

    Two of a million candidates share a key by chance once in some 10^7 searches, and then one is merely not tried.
    """

    multipliers: np.ndarray  # (genes,)
    keys: np.ndarray  # (candidates,) sorted

    @staticmethod
    def empty(space: SearchSpace) -> Seen:
        """No candidate yet."""
        draw = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=len(cardinalities(space)))
        return Seen(draw | 1, np.zeros(0, dtype=np.int64))

    def key(self, genes: np.ndarray) -> np.ndarray:
        """(n,) keys of canonical rows."""
        return genes @ self.multipliers  # wraps around, on purpose

    def new(self, keys: np.ndarray) -> np.ndarray:
        """Indices of the keys that are not known, each once, in order."""
        _, first = np.unique(keys, return_index=True)
        first = np.sort(first)
        at = np.searchsorted(self.keys, keys[first])
        known = np.append(self.keys, 0)[at] == keys[first]
        return first[~(known & (at < len(self.keys)))]

    def with_keys(self, keys: np.ndarray) -> Seen:
        """These candidates too."""
        keys = np.sort(keys)
        return Seen(self.multipliers, np.insert(self.keys, np.searchsorted(self.keys, keys), keys))


def fill(
    n: int, propose: Callable[[int, int], np.ndarray], budget: Budget, seen: Seen, max_rounds: int
) -> tuple[np.ndarray, np.ndarray, Seen]:
    """Up to `n` new candidates inside the budget: their genes, their costs, and what has been seen now.

    `propose(size, round)` makes about that many canonical rows. Rounds grow when few of a round fit. After
    `max_rounds` rounds there may be fewer than `n`, or none: only the caller knows whether that is an error.
    """
    genes, costs, found, size = [], [], 0, 2 * n
    for number in range(max_rounds):
        proposed = propose(size, number)
        keys = seen.key(proposed)
        fresh = seen.new(keys)
        cost = budget.cost(proposed[fresh]) if len(fresh) else np.zeros(0)
        fits = np.flatnonzero(cost <= budget.limit)[: n - found]  # also drops NaN and infinite costs
        kept = fresh[fits]
        seen = seen.with_keys(keys[kept])
        genes.append(proposed[kept])
        costs.append(cost[fits])
        found += len(kept)
        if found == n:
            break
        acceptance = max(len(kept) / len(proposed), 0.5 / len(proposed))
        size = min(MOST_PROPOSALS * n, math.ceil(1.2 * (n - found) / acceptance))
    return np.concatenate(genes), np.concatenate(costs), seen


def newcomers(
    space: SearchSpace, rng: np.random.Generator, cheapest: np.ndarray | None = None
) -> Callable[[int, int], np.ndarray]:
    """A `propose` for `fill` that draws random rows, in the first round uniformly.

    Under a tight budget a random subnet never fits. So the next rounds move each row towards the `cheapest` genes
    `(genes,)`: every gene with the row's own strength u^(1/round), u uniform in 0..1. This spreads rows over all
    strengths first and presses ever closer to the cheapest after that. Without `cheapest` all rounds are uniform.
    """

    def propose(size: int, number: int) -> np.ndarray:
        genes = sample(space, size, rng).astype(np.int16)  # a search moves genes about: small ones are faster
        if cheapest is None or number == 0:
            return genes
        strength = rng.random(size) ** (1 / number)
        strength[:1] = 1.0  # the cheapest itself, so that any budget that can be met is met
        return blend(space, genes, cheapest, strength, rng)

    return propose


def check_reachable(space: SearchSpace, budget: Budget, cheapest: np.ndarray) -> None:
    """UserError that names the cheapest cost where even the `cheapest` genes `(genes,)` are over the budget."""
    (lowest,) = budget.cost(canonical(space, cheapest[None]))
    if lowest > budget.limit:
        raise UserError(
            f"the budget of {budget} is below the cheapest subnet of space {space.name}, "
            f"which needs {lowest:.6g} {budget.unit}".rstrip()
        )
