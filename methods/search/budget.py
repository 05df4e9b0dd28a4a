"""Budgets, and proposals of candidates that are within a budget even where random ones never are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from apq.errors import UserError
from apq.genes import CHUNK, canonical, cardinalities, sample
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
    """The candidates so far, as 64-bit hash keys of their rows.

    Two of a million candidates have equal keys in about one of 10^7 searches. One of them is then not tried.
    """

    multipliers: np.ndarray  # (genes,)
    # Sorted keys in runs, each over 16 times as long as the next, so that adding a few keys does not copy all of them.
    runs: tuple[np.ndarray, ...] = ()

    @staticmethod
    def empty(space: SearchSpace) -> Seen:
        """No candidates."""
        draw = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=len(cardinalities(space)))
        return Seen(draw | 1)

    @property
    def keys(self) -> np.ndarray:
        """(candidates,) int64 keys of all of them, sorted."""
        return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *self.runs]))

    def key(self, genes: np.ndarray) -> np.ndarray:
        """(n,) keys of canonical rows."""
        starts = range(0, len(genes), CHUNK)  # numpy's product has an int64 copy of its rows
        parts = [genes[start : start + CHUNK] @ self.multipliers for start in starts]  # overflow is intended
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def new(self, keys: np.ndarray) -> np.ndarray:
        """Indices of the distinct keys that have not been seen, in order."""
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        is_first = np.append(True, sorted_keys[1:] != sorted_keys[:-1])[: len(keys)]
        distinct, first = sorted_keys[is_first], order[is_first]
        known = np.zeros(len(distinct), dtype=bool)
        for run in self.runs:
            known |= run.take(np.searchsorted(run, distinct), mode="clip") == distinct
        return np.sort(first[~known])

    def with_keys(self, keys: np.ndarray) -> Seen:
        """A copy with these candidates added."""
        runs = list(self.runs)
        while runs and len(runs[-1]) <= 16 * len(keys):
            keys = np.concatenate([runs.pop(), keys])
        return Seen(self.multipliers, (*runs, np.sort(keys, kind="stable"))) if len(keys) else self


def fill(
    n: int, propose: Callable[[int, int], np.ndarray], budget: Budget, seen: Seen, max_rounds: int
) -> tuple[np.ndarray, np.ndarray, Seen]:
    """Collect up to `n` new candidates within the budget. Returns their genes, their costs, and all that were seen.

    `propose(size, round)` returns about `size` canonical rows; it is asked for `CHUNK` of a round at a time. Rounds
    grow when few candidates of a round fit. After `max_rounds` rounds there may be fewer than `n`, or none; the caller
    decides whether that is an error.
    """
    genes, costs, found, size = [], [], 0, 3 * n // 2
    for number in range(max_rounds):
        before, n_proposed = found, 0
        for start in range(0, size, CHUNK):
            proposed = propose(min(CHUNK, size - start), number)
            keys = seen.key(proposed)
            new = seen.new(keys)
            fresh = proposed.take(new, axis=0)
            cost = budget.cost(fresh) if len(new) else np.zeros(0)
            fits = np.flatnonzero(cost <= budget.limit)[: n - found]  # also drops NaN and infinite costs
            seen = seen.with_keys(keys[new[fits]])
            genes.append(fresh.take(fits, axis=0))
            costs.append(cost[fits])
            found += len(fits)
            n_proposed += len(proposed)
            if found == n:
                return np.concatenate(genes), np.concatenate(costs), seen
        acceptance = max(found - before, 0.5) / n_proposed
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
        genes = sample(space, size, rng)
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
