"""Rounds of search and measurement, after each of which the predictor learns from what was measured.

A search exploits the errors of its predictor: what it finds is predicted too well. So each round measures the most
promising and the most uncertain candidates of its search, and the next one searches with a predictor that was trained
on them too (surrogate-assisted search: MSuNAS, Lu et al., ECCV 2020).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from apq.checkpoint import digest
from apq.errors import UserError
from apq.files import Record
from apq.genes import check_genes
from apq.resume import NOT_KEPT, Resume, State
from apq.schema import array, each, fields, mapping, optional
from apq.space import SearchSpace
from elastic_nn.training.distributed import by_first
from elastic_nn.training.session import ONE_PROCESS, Execution
from methods.search.archive import Archive, accuracies_of
from methods.search.candidates import Pool, bands_of_costs, choose, gains
from methods.search.measurement import Measurement
from methods.search.surrogate import Surrogate
from utils.predictor_bands import Bands
from utils.predictor_files import Predictor
from utils.predictor_scores import PredictorScores

INNER = "round"  # of the state of the search of a round
Known = tuple[np.ndarray, np.ndarray]  # genes (n, genes) of measured subnets, and their accuracies (n,)


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search that is refined.

    Attributes:
        find: called with a predictor, the number of the round, the genes to go on from (None: none) and a `Resume`.
            Returns the best candidates.
        price: takes genes (n, genes) and returns the costs (n,) that order or limit candidates.
        one_budget: whether all candidates compete at one budget; otherwise they are measured at all costs.
    """

    find: Callable[[Predictor, int, np.ndarray | None, Resume], Pool]
    price: Callable[[np.ndarray], np.ndarray]
    one_budget: bool


@dataclass(frozen=True, kw_only=True)
class Refining:
    """How to refine a search.

    Attributes:
        rounds, most: number of rounds, and of subnets that they measure in all.
        measurement, archive: how subnets are measured, as the pairs were, and where they are kept.
        surrogate: the predictor to train. Rounds hold out no pairs: what they measure says how good it is.
        device: that of the training of predictors.
    """

    rounds: int
    most: int
    measurement: Measurement
    archive: Archive
    surrogate: Surrogate
    device: torch.device | str = "cpu"

    def measured(self, known: Known, fits: Callable[[np.ndarray], np.ndarray] | None = None) -> Known:
        """Those of `known` subnets that `fits`, a function of genes (n, genes), says (n,); else those of the pairs.

        Pairs count only where there is nothing else: the best of many random ones is mostly a lucky measurement.
        """
        pairs = self.surrogate.genes.astype(np.int64), self.surrogate.accuracies
        for genes, top1 in (known, pairs):
            rows = np.ones(len(genes), dtype=bool) if fits is None else fits(genes)
            if rows.any():
                return genes[rows], top1[rows]
        return pairs[0][:0], pairs[1][:0]

    def trained(self, known: Known) -> Predictor:
        """The predictor that was trained on all pairs and on `known` subnets."""
        return self.surrogate.with_measured(*known).trained_on_all(self.device)

    def scores(self, known: Known) -> tuple[PredictorScores, Bands]:
        """Scores on held-out pairs of a predictor that was trained on the others and on `known` subnets."""
        return self.surrogate.with_measured(*known).trained(self.device)[1:]


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a round measured: genes (n, genes), costs, accuracies as predicted before that, and as measured (n,)."""

    genes: np.ndarray
    costs: np.ndarray
    predicted: np.ndarray
    top1: np.ndarray

    def __str__(self) -> str:
        """What was measured and how far predictions were from that, in words."""
        if not len(self.top1):
            return "nothing new to measure"
        gap = self.record()
        return (
            f"{len(self.top1)} measured, predictions are {100 * gap['mean_difference']:+.2f} points off on average, "
            f"mean |difference| {100 * gap['mean_absolute_difference']:.2f}"
        )

    def record(self) -> Record:
        """How far predictions were from measurements, as plain data."""
        return {"measured": len(self.top1), **_gap(self.predicted, self.top1)}

    def bands(self, most: int = 4) -> list[Record]:
        """The same in bands of cost, each with as many subnets, at most `most` and two subnets in each."""
        if not len(self.top1):
            return []
        n = min(most, max(1, len(self.top1) // 2))
        parts = np.array_split(np.argsort(self.costs, kind="stable"), n)
        return [
            {
                "low": float(self.costs[rows].min()),
                "high": float(self.costs[rows].max()),
                "measured": len(rows),
                **_gap(self.predicted[rows], self.top1[rows]),
            }
            for rows in parts
        ]


@dataclass(frozen=True, kw_only=True)
class Refined:
    """The rounds of a search, and the candidates of the last one, with the history of all.

    `known` are the measured subnets that it has learned from: those of the archive when it began, and its own.
    """

    rounds: tuple[Round, ...]
    pool: Pool
    known: Known

    def record(self) -> Record:
        """How far predictions were from measurements: in every round, and in bands of cost in the last one."""
        last = next((one for one in reversed(self.rounds) if len(one.top1)), self.rounds[-1])
        return {"rounds": [one.record() for one in self.rounds], "bands": last.bands()}


def refine(
    refining: Refining, search: Search, execution: Execution = ONE_PROCESS, resume: Resume = NOT_KEPT
) -> Refined:
    """Search and measure in rounds. The first process searches, all processes measure. A killed run continues.

    What other searches add to the archive meanwhile saves measurements, and changes nothing else.
    """
    rounds: list[Round] = []
    state = by_first(partial(_begun, refining, resume), execution)
    for number in range(refining.rounds):
        share = (refining.most + refining.rounds - 1 - number) // refining.rounds  # the first ones have one more
        if number == len(state["rounds"]):
            known = _known(state, rounds)
            state = by_first(partial(_with_round, refining, search, state, known, resume, share), execution)
        genes, predicted = (state["rounds"][number][key] for key in ("genes", "predicted"))
        what = f"round {number + 1} of {refining.rounds}"
        top1 = refining.archive.measure(refining.measurement, genes, execution, what)
        rounds.append(Round(genes=genes, costs=search.price(genes), predicted=predicted, top1=top1))
        if execution.main:
            print(f"{what}: {rounds[-1]}", file=sys.stderr)
    history = [record for one in state["rounds"] for record in one["history"]]
    pool = Pool(genes=state["pool"], costs=search.price(state["pool"]), history=history)
    return Refined(rounds=tuple(rounds), pool=pool, known=_known(state, rounds))


def _begun(refining: Refining, resume: Resume) -> State:
    """The state to continue from. A new one has all that the archive holds, which is not looked at again."""
    if (state := resume.load(partial(_check, refining.archive.space))) is None:
        genes, top1 = refining.archive.load()
        state = {"known": {"genes": genes.astype(np.int64), "top1": top1}, "rounds": [], "pool": None}
        resume.save(state)
    return state


def _known(state: State, rounds: Sequence[Round]) -> Known:
    """What was measured when the search began, and in these rounds of it."""
    known = state["known"]
    genes, top1 = ([known[key], *(getattr(one, key) for one in rounds)] for key in ("genes", "top1"))
    return np.concatenate(genes), np.concatenate(top1)


def _check(space: SearchSpace, state: Any) -> None:
    """UserError unless a search in this space can have saved the state."""
    genes = partial(check_genes, space)
    round_check = fields(genes=genes, predicted=array("f", None), history=each(mapping))
    known_check = fields(genes=genes, top1=array("f", None, low=0, high=1))
    fields(known=known_check, rounds=each(round_check), pool=optional(genes))(state)
    if len(state["known"]["genes"]) != len(state["known"]["top1"]):
        raise UserError("its measured subnets do not have one accuracy each")
    if (state["pool"] is None) != (not state["rounds"]):
        raise UserError("its rounds have no candidates")
    if any(len(one["genes"]) != len(one["predicted"]) for one in state["rounds"]):
        raise UserError("its candidates do not have one prediction each")


def _with_round(refining: Refining, search: Search, state: State, known: Known, resume: Resume, n: int) -> State:
    """The state with one more round: its search, and the candidates to measure. `known` are measured before it."""
    number = len(state["rounds"])
    predictor = refining.trained(known)
    inner = resume.other(INNER, {"round": number, "predictor": digest(predictor.state_dict())})
    pool = search.find(predictor, number, state["pool"], inner)
    # Of candidates that were measured before the predictor knows more than another measurement would tell, also of
    # pairs. Those that are held out must stay so.
    pairs = refining.surrogate.genes, refining.surrogate.accuracies
    is_new = np.isnan(accuracies_of(pool.genes, *known)) & np.isnan(accuracies_of(pool.genes, *pairs))
    unknown = pool.take(np.flatnonzero(is_new))
    genes, predicted = _to_measure(search, predictor, unknown, known, n, turn=number)
    history = [{**record, "round": number + 1} for record in pool.history]
    found = {"genes": genes.astype(np.int64), "predicted": predicted.astype(np.float64), "history": history}
    state = {**state, "rounds": [*state["rounds"], found], "pool": pool.genes}
    resume.save(state)
    inner.done()
    return state


def _to_measure(
    search: Search, predictor: Predictor, unknown: Pool, known: Known, n: int, turn: int
) -> tuple[np.ndarray, np.ndarray]:
    """Genes (up to n, genes) of the candidates to measure, and their predicted accuracies."""
    if not len(unknown):  # all of a small space is measured
        return unknown.genes, np.zeros(0)
    mean, spread = predictor.mean_and_spread(unknown.genes)
    gain = mean if search.one_budget else gains(mean, unknown.costs, known[1], search.price(known[0]))
    bands = bands_of_costs(unknown.costs, 1 if search.one_budget else n)
    rows = choose(unknown.genes, gain, spread, bands, n, turn, unknown.first)
    return unknown.genes[rows], mean[rows]


def _gap(predicted: np.ndarray, top1: np.ndarray) -> Record:
    """Mean of predicted less measured accuracies (n,), and of its absolute value; None of no subnets."""
    gaps = predicted - top1
    means = (float(gaps.mean()), float(np.abs(gaps).mean())) if len(gaps) else (None, None)
    return dict(zip(("mean_difference", "mean_absolute_difference"), means, strict=True))
