"""Budgets, and proposals of candidates that are within a budget even where random ones never are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from apq.errors import UserError
from apq.genes import canonical, cardinalities, sample
from apq.space import SearchSpace
from methods.search.operators import blend

MOST_PROPOSALS = 4  # proposals a round, for each candidate that is needed


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A cost of at most `limit`, in `unit`. `cost` takes genes `(n, genes)` and returns costs `(n,)`.

    UserError for a limit that is not a positive number.
    """

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
    """The candidates so far, as sorted 64-bit hash keys of their rows.

    Two of a million candidates have equal keys in about one of 10^7 searches. One of them is then not tried.
    """

    multipliers: np.ndarray  # (genes,)
    keys: np.ndarray  # (candidates,) sorted

    @staticmethod
    def empty(space: SearchSpace) -> Seen:
        """No candidates."""
        draw = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=len(cardinalities(space)))
        return Seen(draw | 1, np.zeros(0, dtype=np.int64))

    def key(self, genes: np.ndarray) -> np.ndarray:
        """(n,) keys of canonical rows."""
        return genes @ self.multipliers  # overflow is intended

    def new(self, keys: np.ndarray) -> np.ndarray:
        """Indices of the distinct keys that have not been seen, in order."""
        _, first = np.unique(keys, return_index=True)
        first = np.sort(first)
        at = np.searchsorted(self.keys, keys[first])
        known = np.append(self.keys, 0)[at] == keys[first]
        return first[~(known & (at < len(self.keys)))]

    def with_keys(self, keys: np.ndarray) -> Seen:
        """A copy with these candidates added."""
        keys = np.sort(keys)
        return Seen(self.multipliers, np.insert(self.keys, np.searchsorted(self.keys, keys), keys))


def fill(
    n: int, propose: Callable[[int, int], np.ndarray], budget: Budget, seen: Seen, max_rounds: int
) -> tuple[np.ndarray, np.ndarray, Seen]:
    """Collect up to `n` new candidates within the budget. Returns their genes, their costs, and all that were seen.

    `propose(size, round)` returns about `size` canonical rows. Rounds grow when few candidates of a round fit. After
    `max_rounds` rounds there may be fewer than `n`, or none; the caller decides whether that is an error.
    """
    genes, costs, found, size = [], [], 0, 2 * n
    for number in range(max_rounds):
        proposed = propose(size, number)
        keys = seen.key(proposed)
        new = seen.new(keys)
        cost = budget.cost(proposed[new]) if len(new) else np.zeros(0)
        fits = np.flatnonzero(cost <= budget.limit)[: n - found]  # also drops NaN and infinite costs
        kept = new[fits]
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
    """A `propose` for `fill` that draws random rows. The first round is uniform.

    Random subnets never fit a tight budget. So the next rounds move each row towards the `cheapest` genes `(genes,)`:
    each gene becomes the cheapest with probability u^(1/round), u uniform in 0 to 1 and the same for all genes of a
    row. Later rounds are closer to the cheapest. Without `cheapest` all rounds are uniform.
    """

    def propose(size: int, number: int) -> np.ndarray:
        genes = sample(space, size, rng).astype(np.int16)  # small integers are faster to move
        if cheapest is None or number == 0:
            return genes
        strength = rng.random(size) ** (1 / number)
        strength[:1] = 1.0  # the cheapest row itself, so that every budget that can be met is met
        return blend(space, genes, cheapest, strength, rng)

    return propose


def check_reachable(space: SearchSpace, budget: Budget, cheapest: np.ndarray) -> None:
    """UserError if even the `cheapest` genes `(genes,)` are over the budget. It names the lowest cost."""
    (lowest,) = budget.cost(canonical(space, cheapest[None]))
    if lowest > budget.limit:
        raise UserError(
            f"the budget of {budget} is below the cheapest subnet of space {space.name}, "
            f"which needs {lowest:.6g} {budget.unit}".rstrip()
        )
