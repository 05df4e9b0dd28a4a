"""NSGA-II (Deb et al. 2002) on gene matrices: the front of accuracy and costs, for all budgets, in one search.

QFA (NeurIPS 2021) runs it with 500 candidates and 1,000 generations. Sorting and crowding are pymoo's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from apq.bounds import LARGEST_NUMBER
from apq.errors import UserError
from apq.files import Record
from apq.genes import CHUNK, check_genes, sample
from apq.resume import NOT_KEPT, Resume
from apq.schema import MOST, array, each, fields, generator, number, whole
from apq.space import SearchSpace
from methods.nsga2.config import Nsga2Config
from methods.nsga2.sorting import survivors, tournament
from methods.search.budget import Seen
from methods.search.operators import blend, crossover, mutate

MOST_ROUNDS = 6  # rounds of proposals a generation: a small space may have no new candidates left
FEWEST_PROPOSALS = 32  # proposals a round


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A quantity to minimise, or to `maximise`: `score` takes genes `(n, genes)` and returns `(n,)`, in `unit`.

    `cheapest` is the gene row of the lowest score, if it is known. The front then reaches that end.
    """

    name: str
    score: Callable[[np.ndarray], np.ndarray]
    maximise: bool = False
    unit: str = ""
    cheapest: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Front:
    """The candidates that no other dominates, by ascending first cost, and one record a generation."""

    genes: np.ndarray  # (n, genes)
    values: np.ndarray  # (n, objectives), predicted
    measured: np.ndarray  # (n,) top-1 from 0 to 1, NaN where a candidate was not measured
    history: list[Record]


@dataclass(frozen=True, kw_only=True)
class _Population:
    """Survivors of a generation, by rank."""

    genes: np.ndarray  # (n, genes)
    values: np.ndarray  # (n, objectives)
    ranks: np.ndarray  # (n,)
    crowding: np.ndarray  # (n,)


def find_front(
    space: SearchSpace,
    objectives: Sequence[Objective],
    config: Nsga2Config,
    on_generation: Callable[[Record], None] = lambda record: None,
    resume: Resume = NOT_KEPT,
    start: np.ndarray | None = None,
) -> Front:
    """Search the front of 2 to 4 objectives. The same seed gives the same result.

    `on_generation` is called with each record. `start` are canonical rows (n, genes) to go on from. The search ends
    early when no new candidate can be found. It continues from the state in `resume`, and saves it when that is due.
    UserError for other numbers of objectives, and for scores that are not finite.
    """
    if not 2 <= len(objectives) <= 4:
        raise UserError(f"a front has 2 to 4 objectives, not {len(objectives)}")
    rng = np.random.default_rng(config.seed)
    if (state := resume.load(partial(_check, space, objectives))) is None:
        genes = first_population(space, objectives, config.population, rng, start)
        pool = _select(objectives, genes, scores(objectives, genes), config.population)
        history = [_record(pool, objectives, [], len(genes))]
        on_generation(history[0])
    else:
        history, rng.bit_generator.state = state.pop("history"), state.pop("rng")
        pool = _Population(**state)
    for _ in range(len(history) - 1, config.generations):
        children = _children(space, pool, config, rng)
        if not len(children):
            break
        genes = np.concatenate([pool.genes, children])
        values = np.concatenate([pool.values, scores(objectives, children)])
        pool = _select(objectives, genes, values, config.population)
        history.append(_record(pool, objectives, history, len(children)))
        on_generation(history[-1])
        if resume.due:
            resume.save({**vars(pool), "rng": rng.bit_generator.state, "history": history})
    return _front(pool, objectives, history)


def _check(space: SearchSpace, objectives: Sequence[Objective], state: Any) -> None:
    """UserError unless a search of these objectives can have saved the state."""
    n = len(state["genes"]) if isinstance(state, dict) and isinstance(state.get("genes"), np.ndarray) else 0
    bests = {f"best_{one.name}": number() for one in objectives}
    counts = dict.fromkeys(("generation", "front", "evaluated"), whole(0, MOST))
    fields(
        genes=partial(check_genes, space),
        values=array("f", n, len(objectives), low=-LARGEST_NUMBER, high=LARGEST_NUMBER),
        ranks=array("i", n, low=0, high=n),
        crowding=array("f", n, low=0),
        rng=generator,
        history=each(fields(**counts, **bests)),
    )(state)
    if not n or not state["history"]:
        raise UserError("it has no candidates")


def first_population(
    space: SearchSpace,
    objectives: Sequence[Objective],
    n: int,
    rng: np.random.Generator,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """(up to n, genes) distinct random rows, the cheapest of each objective among them; up to half are from `start`.

    Uniform choices rarely give a cheap subnet. So only one part of the rows is uniform. For each objective with a
    cheapest row, another part is moved towards that row by strengths from 0 to 1, which covers the way to that end.
    """
    genes = sample(space, 2 * n, rng)  # twice as many as needed, because duplicates are dropped
    targets = [one.cheapest for one in objectives if one.cheapest is not None]
    for i, target in enumerate(targets):
        part = genes[i :: len(targets) + 1]
        strength = rng.random(len(part))
        strength[0] = 1.0
        part[:] = blend(space, part, target, strength, rng)
    if start is not None:
        rows = np.unique(np.linspace(0, len(start) - 1, min(len(start), n // 2)).round().astype(int))
        genes = np.concatenate([start[rows].astype(genes.dtype), genes])
    seen = Seen.empty(space)
    return genes[seen.new(seen.key(genes))[:n]]


def scores(objectives: Sequence[Objective], genes: np.ndarray) -> np.ndarray:
    """(n, objectives) float64 scores of candidates. UserError where one is not finite."""
    values = np.stack([np.asarray(one.score(genes), dtype=np.float64) for one in objectives], axis=1)
    finite = np.isfinite(values).all(axis=0)
    if not finite.all():
        names = ", ".join(one.name for one, is_finite in zip(objectives, finite, strict=True) if not is_finite)
        raise UserError(f"{names} of some subnets is not a finite number; its predictor or table is damaged")
    return values


def losses_of(objectives: Sequence[Objective], values: np.ndarray) -> np.ndarray:
    """(n, objectives) values whose sign is such that lower is better."""
    return values * np.where([one.maximise for one in objectives], -1.0, 1.0)


def _select(objectives: Sequence[Objective], genes: np.ndarray, values: np.ndarray, n: int) -> _Population:
    kept, ranks, crowding = survivors(losses_of(objectives, values), n)
    return _Population(genes=genes[kept], values=values[kept], ranks=ranks, crowding=crowding)


def _children(space: SearchSpace, pool: _Population, config: Nsga2Config, rng: np.random.Generator) -> np.ndarray:
    """(up to population, genes) distinct rows that are not in the pool."""
    seen = Seen.empty(space)
    seen = seen.with_keys(seen.key(pool.genes))
    found, missing, size = [pool.genes[:0]], config.population, config.population
    for _ in range(MOST_ROUNDS):
        parts = [_offspring(space, pool, min(CHUNK, size - start), config, rng) for start in range(0, size, CHUNK)]
        children = np.concatenate(parts)
        keys = seen.key(children)
        new = seen.new(keys)[:missing]
        found.append(children[new])
        missing -= len(new)
        if not missing:
            break
        seen = seen.with_keys(keys[new])
        size = max(2 * missing, FEWEST_PROPOSALS)
    return np.concatenate(found)


def _offspring(
    space: SearchSpace, pool: _Population, n: int, config: Nsga2Config, rng: np.random.Generator
) -> np.ndarray:
    """(n, genes) mutated crossovers of winners of tournaments."""
    parents = pool.genes.take(tournament(pool.ranks, pool.crowding, 2 * n, rng), axis=0)
    children = crossover(space, parents[:n], parents[n:], rng, config.crossover_prob)
    return mutate(space, children, np.full(n, config.mutation_prob), rng)


def _record(pool: _Population, objectives: Sequence[Objective], history: list[Record], n_scored: int) -> Record:
    best = losses_of(objectives, losses_of(objectives, pool.values).min(axis=0, keepdims=True))[0]
    return {
        "generation": len(history),
        "front": int((pool.ranks == 0).sum()),
        **{f"best_{one.name}": float(value) for one, value in zip(objectives, best, strict=True)},
        "evaluated": (history[-1]["evaluated"] if history else 0) + n_scored,
    }


def _front(pool: _Population, objectives: Sequence[Objective], history: list[Record]) -> Front:
    best = np.flatnonzero(pool.ranks == 0)
    return _sorted_front(objectives, pool.genes[best], pool.values[best], history)


def measured_front(
    objectives: Sequence[Objective], genes: np.ndarray, top1: np.ndarray, history: list[Record]
) -> Front:
    """The front of measured subnets (n, genes) by their accuracies `top1` (n,), which stand for the first objective."""
    values = scores(objectives, genes)
    judged = np.column_stack([top1, values[:, 1:]])
    kept, ranks, _ = survivors(losses_of(objectives, judged), len(genes))
    best = np.sort(kept[ranks == 0])
    found = _sorted_front(objectives, genes[best], judged[best], history)
    return replace(found, values=scores(objectives, found.genes), measured=found.values[:, 0])


def _sorted_front(
    objectives: Sequence[Objective], genes: np.ndarray, values: np.ndarray, history: list[Record]
) -> Front:
    """Points of a front by ascending first cost, the first of those with equal values."""
    losses = losses_of(objectives, values)
    costs_first = np.argsort([one.maximise for one in objectives], kind="stable")
    _, first = np.unique(losses[:, costs_first], axis=0, return_index=True)  # sorted by the first cost
    return Front(genes=genes[first], values=values[first], measured=np.full(len(first), np.nan), history=history)
