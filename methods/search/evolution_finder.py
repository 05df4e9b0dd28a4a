"""Evolutionary search for the most accurate subnet inside a budget (APQ, Wang et al., CVPR 2020, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.files import Record
from apq.genes import check_genes, gene_type, subnets_of
from apq.resume import NOT_KEPT, Resume, State
from apq.schema import MOST, array, each, fields, generator, number, whole
from apq.space import SearchSpace
from apq.subnet import Subnet
from methods.search.budget import Budget, Seen, check_reachable, fill, newcomers
from methods.search.operators import crossover, mutate

Log = Callable[[Record], None]


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Settings of a search. UserError where one is out of range.

    Each generation keeps the best `parent_ratio * population` candidates as parents and makes `population` children.
    The defaults are among the best that benchmarks/search_defaults.py found at 50,000 candidates.

    Attributes:
        mutation_ratio: fraction of the children that are mutants; the others are crossovers. Newcomers fill the gap
            where these are too few.
        mutation_prob: probability that a gene of a mutant is redrawn.
        patience: generations without a better subnet that end the search; None: never.
        max_rounds: most rounds of proposals for the first population.
    """

    population: int = 500
    generations: int = 100
    parent_ratio: float = 0.25
    mutation_prob: float = 0.02
    mutation_ratio: float = 0.5
    seed: int = 0
    patience: int | None = None
    max_rounds: int = 20

    def __post_init__(self) -> None:
        if self.population < 2 or self.generations < 0 or self.max_rounds < 1:
            raise UserError("population must be at least 2, generations at least 0, max_rounds at least 1")
        if not (0 < self.parent_ratio <= 1 and 0 < self.mutation_prob <= 1 and 0 <= self.mutation_ratio <= 1):
            raise UserError("parent_ratio and mutation_prob lie above 0 and up to 1, mutation_ratio from 0 to 1")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"patience must be a positive number of generations or None, not {self.patience}")


EVOLUTIONS = {
    "default": EvolutionConfig(),
    # APQ's code: run_evolution_search and its call with 500 iterations; block_mutation_prob of mutate_spec, which is a
    # chance of whole blocks. Here it is that of each gene.
    "published": EvolutionConfig(
        population=100, generations=500, parent_ratio=0.25, mutation_prob=0.1, mutation_ratio=0.5
    ),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best subnet, its predicted accuracy and its cost, and one record a generation.

    `genes` (n, genes) are all candidates of the last generation, best first; None where they are not kept.
    """

    subnet: Subnet
    accuracy: float
    cost: float
    history: list[Record]
    genes: np.ndarray | None = field(default=None, compare=False)  # arrays cannot be compared as a whole


@dataclass(frozen=True)
class _Pool:
    """Scored candidates, best first."""

    genes: np.ndarray  # (n, genes)
    accuracies: np.ndarray  # (n,)
    costs: np.ndarray  # (n,)

    def best(self, n: int) -> _Pool:
        return _Pool(self.genes[:n], self.accuracies[:n], self.costs[:n])

    def joined(self, other: _Pool) -> _Pool:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Pool(*(np.concatenate(pair) for pair in pairs)).ranked()

    def ranked(self) -> _Pool:
        order = np.argsort(-self.accuracies, kind="stable")
        return _Pool(*(values.take(order, axis=0) for values in vars(self).values()))


class EvolutionFinder:
    """Searches a space for the most accurate subnet whose cost is at most `constraint`.

    UserError for a constraint that is not positive or that no subnet meets, and for accuracies that are NaN.

    Args:
        accuracy, cost: functions from a gene matrix `(n, genes)` to `(n,)`.
        cheapest: gene row of the cheapest subnet. With it tight budgets are reached, and impossible ones fail at once.
        unit: unit of the cost, for messages.
        start: canonical rows (n, genes) to go on from, best first. Up to half of the first generation are of them.
    """

    def __init__(
        self,
        space: SearchSpace,
        accuracy: Callable[[np.ndarray], np.ndarray],
        cost: Callable[[np.ndarray], np.ndarray],
        constraint: float,
        config: EvolutionConfig | None = None,
        cheapest: np.ndarray | None = None,
        unit: str = "",
        start: np.ndarray | None = None,
    ) -> None:
        self.space, self.accuracy, self.cheapest = space, accuracy, cheapest
        self.budget = Budget(cost=cost, limit=constraint, unit=unit)
        self.config = config or EvolutionConfig()
        self.start = None if start is None else start[: self.config.population // 2].astype(gene_type(space))
        if cheapest is not None:
            check_reachable(space, self.budget, cheapest)

    def run(self, on_generation: Log | None = None, resume: Resume = NOT_KEPT) -> Found:
        """Run the search. The same seed gives the same result.

        Parents, mutants and crossovers compete in one pool, and no candidate is scored twice. `on_generation` is called
        with each record. The search ends early when no new candidate can be found. It continues from the state in
        `resume`, and saves it when that is due.
        """
        config = self.config
        if (state := resume.load(self._check)) is None:
            pool, seen, rng, history, since_better = self._first_generation(on_generation)
        else:
            pool, seen, rng, history, since_better = self._restored(state)
        for _ in range(len(history) - 1, config.generations):
            if since_better == config.patience:
                break
            parents = pool.best(max(2, round(config.parent_ratio * config.population)))
            genes, costs, seen = self._children(parents.genes, seen, rng)
            if not len(genes):
                break
            pool = parents.joined(self._scored(genes, costs))
            self._record(history, pool, len(genes), on_generation)
            since_better = 0 if pool.accuracies[0] > parents.accuracies[0] else since_better + 1
            if resume.due:
                rest = {"rng": rng.bit_generator.state, "history": history, "since_better": since_better}
                resume.save({**vars(pool), "seen": seen.keys, **rest})
        (subnet,) = subnets_of(self.space, pool.genes[:1])
        best = {"accuracy": float(pool.accuracies[0]), "cost": float(pool.costs[0])}
        return Found(subnet=subnet, **best, history=history, genes=pool.genes)

    def _check(self, state: Any) -> None:
        """UserError unless this search can have saved the state."""
        scores = dict.fromkeys(("best_accuracy", "best_cost", "mean_accuracy"), number())
        fields(
            genes=partial(check_genes, self.space),
            accuracies=array("f", None),
            costs=array("f", None, high=self.budget.limit),
            seen=array("i", None),
            rng=generator,
            history=each(fields(generation=whole(0, MOST), evaluated=whole(0, MOST), **scores)),
            since_better=whole(0, MOST),
        )(state)
        if not len(state["genes"]) == len(state["accuracies"]) == len(state["costs"]) > 0 or not state["history"]:
            raise UserError("its candidates do not have one accuracy and one cost each")

    def _restored(self, state: State) -> tuple[_Pool, Seen, np.random.Generator, list[Record], int]:
        rng = np.random.default_rng()
        rng.bit_generator.state = state["rng"]
        pool = _Pool(state["genes"], state["accuracies"], state["costs"])
        seen = Seen.empty(self.space).with_keys(state["seen"])
        return pool, seen, rng, state["history"], state["since_better"]

    def _first_generation(
        self, on_generation: Log | None
    ) -> tuple[_Pool, Seen, np.random.Generator, list[Record], int]:
        config = self.config
        rng = np.random.default_rng(config.seed)
        draw = newcomers(self.space, rng, self.cheapest)

        def first(size: int, number: int) -> np.ndarray:
            drawn = draw(size, number)
            return drawn if number or self.start is None else np.concatenate([self.start, drawn])

        genes, costs, seen = fill(
            config.population,
            first,
            self.budget,
            Seen.empty(self.space),
            config.max_rounds,
        )
        if not len(genes):
            raise UserError(
                f"no subnet of space {self.space.name} within {self.budget} found in {config.max_rounds} rounds of "
                "drawing; raise the constraint"
            )
        pool, history = self._scored(genes, costs).ranked(), []
        self._record(history, pool, len(genes), on_generation)
        return pool, seen, rng, history, 0

    def _children(
        self, parents: np.ndarray, seen: Seen, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, Seen]:
        config = self.config

        def crossovers(size: int, _: int) -> np.ndarray:
            mothers, fathers = rng.integers(len(parents), size=(2, size))
            return crossover(self.space, parents.take(mothers, axis=0), parents.take(fathers, axis=0), rng)

        def mutants(size: int, number: int) -> np.ndarray:
            # Near a tight budget most large steps cost too much. After the first round steps have all sizes, down to
            # one gene.
            smallest = min(1.0, 1 / parents.shape[1] / config.mutation_prob)
            scale = smallest ** rng.random(size) if number else np.ones(size)
            chosen = parents.take(rng.integers(len(parents), size=size), axis=0)
            return mutate(self.space, chosen, config.mutation_prob * scale, rng)

        # When parents have become alike, few of their crossovers are new. Mutants fill the gap, then newcomers, so that
        # a search that has converged explores elsewhere.
        n_crossovers = round((1 - config.mutation_ratio) * config.population)
        genes, costs = np.zeros((0, parents.shape[1]), dtype=parents.dtype), np.zeros(0)
        for propose, n, max_rounds in (
            (crossovers, n_crossovers, 2),
            (mutants, config.population, 4),
            (newcomers(self.space, rng, self.cheapest), config.population, 2),
        ):
            if len(genes) < n:
                more, more_costs, seen = fill(n - len(genes), propose, self.budget, seen, max_rounds)
                genes, costs = np.concatenate([genes, more]), np.concatenate([costs, more_costs])
        return genes, costs, seen

    def _scored(self, genes: np.ndarray, costs: np.ndarray) -> _Pool:
        accuracies = np.asarray(self.accuracy(genes))
        if np.isnan(accuracies).any():
            raise UserError("the accuracy predictor returned NaN; its file is damaged or its training failed")
        return _Pool(genes, accuracies, costs)

    def _record(
        self,
        history: list[Record],
        pool: _Pool,
        n_scored: int,
        on_generation: Log | None,
    ) -> None:
        history.append(
            {
                "generation": len(history),
                "best_accuracy": float(pool.accuracies[0]),
                "best_cost": float(pool.costs[0]),
                "mean_accuracy": float(pool.accuracies.mean()),
                "evaluated": (history[-1]["evaluated"] if history else 0) + n_scored,
            }
        )
        if on_generation:
            on_generation(history[-1])
