"""NSGA-II (Deb et al. 2002) on a gene matrix: the front of accuracy and costs, for all budgets, in one search.

QFA (NeurIPS 2021) searches so: 500 candidates, 1,000 generations. Sorting and crowding are pymoo's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from apq.errors import UserError
from apq.files import Record
from apq.genes import sample
from apq.resume import NOT_KEPT, Resume
from apq.space import SearchSpace
from methods.nsga2.config import Nsga2Config
from methods.nsga2.sorting import survivors, tournament
from methods.search.budget import Seen
from methods.search.operators import blend, crossover, mutate

SAVE_SECONDS = 1.0  # between saves of a search
MOST_ROUNDS = 6  # of proposals for one generation: a small space may have no more that are new
FEWEST_PROPOSALS = 32  # a round


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Something to minimise, or to `maximise`: `score` takes genes `(n, genes)` and returns `(n,)`, in `unit`.

    `cheapest` is the gene row of the lowest score, where it is known; the front then reaches that end.
    """

    name: str
    score: Callable[[np.ndarray], np.ndarray]
    maximise: bool = False
    unit: str = ""
    cheapest: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Front:
    """Candidates of which none is beaten by another, by ascending first cost, and one record a generation."""

    genes: np.ndarray  # (n, genes)
    values: np.ndarray  # (n, objectives)
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
) -> Front:
    """Search the front of 2 to 4 objectives; the same seed gives the same result.

    `on_generation` gets each record as it is made. The search also ends when no new candidate can be found. It
    continues from the state in `resume`, which it saves when that is due.
    """
    if not 2 <= len(objectives) <= 4:
        raise UserError(f"a front has 2 to 4 objectives, not {len(objectives)}")
    rng = np.random.default_rng(config.seed)
    if (state := resume.load()) is None:
        genes = first_population(space, objectives, config.population, rng)
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


def first_population(
    space: SearchSpace, objectives: Sequence[Objective], n: int, rng: np.random.Generator
) -> np.ndarray:
    """(up to n, genes) different random rows, the cheapest of each objective among them.

    Uniform choices hardly ever make a cheap subnet. So one part of the rows is uniform, and one part for each objective
    with a cheapest row is moved towards that, by strengths from 0 to 1: such rows cover the way to that end.
    """
    genes = sample(space, 2 * n, rng).astype(np.int16)  # twice what is wanted, since doubles are dropped
    targets = [one.cheapest for one in objectives if one.cheapest is not None]
    for i, target in enumerate(targets):
        part = genes[i :: len(targets) + 1]
        strength = rng.random(len(part))
        strength[0] = 1.0
        part[:] = blend(space, part, target, strength, rng)
    seen = Seen.empty(space)
    return genes[seen.new(seen.key(genes))[:n]]


def scores(objectives: Sequence[Objective], genes: np.ndarray) -> np.ndarray:
    """(n, objectives) float64 values of candidates; UserError where one is not finite."""
    values = np.stack([np.asarray(one.score(genes), dtype=np.float64) for one in objectives], axis=1)
    if not np.isfinite(values).all():
        odd = ", ".join(
            one.name for one, fine in zip(objectives, np.isfinite(values).all(axis=0), strict=True) if not fine
        )
        raise UserError(f"{odd} of some subnets is not a finite number; its predictor or table is damaged")
    return values


def losses_of(objectives: Sequence[Objective], values: np.ndarray) -> np.ndarray:
    """(n, objectives) values with the sign that makes less better."""
    return values * np.where([one.maximise for one in objectives], -1.0, 1.0)


def _select(objectives: Sequence[Objective], genes: np.ndarray, values: np.ndarray, n: int) -> _Population:
    kept, ranks, crowding = survivors(losses_of(objectives, values), n)
    return _Population(genes=genes[kept], values=values[kept], ranks=ranks, crowding=crowding)


def _children(space: SearchSpace, pool: _Population, config: Nsga2Config, rng: np.random.Generator) -> np.ndarray:
    """(up to population, genes) rows that are neither in the pool nor twice."""
    seen = Seen.empty(space)
    seen = seen.with_keys(seen.key(pool.genes))
    found, wanted, size = [pool.genes[:0]], config.population, config.population
    for _ in range(MOST_ROUNDS):
        parents = pool.genes[tournament(pool.ranks, pool.crowding, 2 * size, rng)]
        children = crossover(space, parents[:size], parents[size:], rng, config.crossover_prob)
        children = mutate(space, children, np.full(size, config.mutation_prob), rng)
        keys = seen.key(children)
        fresh = seen.new(keys)[:wanted]
        found.append(children[fresh])
        wanted -= len(fresh)
        if not wanted:
            break
        seen = seen.with_keys(keys[fresh])
        size = max(2 * wanted, FEWEST_PROPOSALS)
    return np.concatenate(found)


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
    losses = losses_of(objectives, pool.values[best])
    costs_first = np.argsort([one.maximise for one in objectives], kind="stable")
    _, first = np.unique(losses[:, costs_first], axis=0, return_index=True)  # sorts, too
    best = best[first]
    return Front(genes=pool.genes[best], values=pool.values[best], history=history)
