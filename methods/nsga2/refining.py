"""A search for a front that measures: `search.py --mode nsga2 --refine ROUNDS --measure N`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import numpy as np

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.resume import Resume
from apq.search_result import SearchResult
from dataset import image_folder, recorded_folder
from dataset.imagenet import report_unreadable
from elastic_nn.training.distributed import by_first
from elastic_nn.training.session import Execution
from methods.nsga2.front_finder import Front, front_among
from methods.nsga2.front_records import measured_of, with_records
from methods.nsga2.front_search import FrontTask, load_task
from methods.nsga2.measuring import MEASURED_BY, Measuring
from methods.nsga2.recording import index_of, picked, save
from methods.search.archive import accuracies_of
from methods.search.candidates import Pool
from methods.search.predicted import scores_of
from methods.search.refine import Refined, Refining, Search, refine
from methods.search.refine_report import REFINED
from methods.search.refine_task import check_flags, depends_on, load_refining, warn_of_one_mlp
from utils.predictor_files import Predictor

STATE = "refine.state.pt"


def refined_search(
    args: argparse.Namespace, experiment: Experiment, execution: Execution
) -> tuple[Front, SearchResult]:
    """Search the front in rounds, measure its pick, and record it. The first process searches, all measure.

    The front is that of the last round's candidates and of all measured subnets, by the predictor that was trained on
    these too. UserError if no point is within --pick; the front is kept.
    """
    by_first(lambda: (check_flags(args), experiment.check_free(args.overwrite)), execution)
    task = load_task(args)
    by_first(partial(warn_of_one_mlp, args, task.predictor), execution)
    refining = load_refining(args, task.predictor, execution, max(args.refine, args.measure - 1))  # one for the pick
    measuring = Measuring(
        measurement=refining.measurement,
        most=args.measure,
        data=image_folder(args.data),
        deterministic=args.deterministic,
    )
    asked = {**task.asked(), **depends_on(refining, args.measure)}
    resume = Resume(experiment.path / STATE, asked, "search", args.overwrite, writes=execution.main)
    found = refine(refining, search_of(task), execution, resume)
    front, result, problem = by_first(partial(picked_front, task, refining, found, measuring), execution)
    row = index_of(front, result)
    if not problem and np.isnan(front.measured[row]) and sum(len(one.top1) for one in found.rounds) < args.measure:
        top1 = refining.archive.measure(refining.measurement, front.genes[[row]], execution, "pick")
        front = replace(front, measured=np.where(np.arange(len(front.genes)) == row, top1, front.measured))
    # Recorded when all is measured: until then the state of the rounds is there, and a killed run continues.
    result = by_first(partial(recorded, experiment, front, result, problem), execution)
    if execution.main:
        report_unreadable(measuring.measurement.splits)
    return front, result


def search_of(task: FrontTask) -> Search:
    """The search of a round. Each round has a seed of its own."""

    def find(predictor: Predictor, number: int, start: np.ndarray | None, resume: Resume) -> Pool:
        config = replace(task.config, seed=task.config.seed + number)
        front = task.find(predictor, config, resume, start)
        return Pool(genes=front.genes, costs=front.values[:, 1], history=front.history)

    first = next(iter(task.costs.values()))
    return Search(find=find, price=first.predict, one_budget=False)


def picked_front(
    task: FrontTask, refining: Refining, found: Refined, measuring: Measuring
) -> tuple[Front, SearchResult, str]:
    """The refined front with its pick. Where no point is within --pick: its most accurate point, and what is wrong."""
    front = front_of(task, found, refining.trained(found.known))
    facts: Record = {REFINED: found.record(), MEASURED_BY: measuring.record}
    facts |= scores_of(*refining.scores(found.known))
    searched = task.result(front, {**facts, **recorded_folder(measuring.data)})
    try:
        return front, picked(searched, front, task.bounds), ""
    except UserError as error:
        return front, picked(searched, front, ()), str(error)


def recorded(experiment: Experiment, front: Front, result: SearchResult, problem: str) -> SearchResult:
    """The result with what was measured, written into the experiment. UserError if there was a problem with --pick."""
    result = replace(with_records(front, result), measured_top1=measured_of(front, index_of(front, result)))
    save(experiment, front, result)
    if problem:
        raise UserError(f"{problem}; {experiment.path} has the front, with its most accurate point")
    return result


def front_of(task: FrontTask, found: Refined, predictor: Predictor) -> Front:
    """The front of the last candidates and of all measured subnets, by this predictor."""
    genes = np.concatenate([found.pool.genes.astype(np.int64), found.known[0].astype(np.int64)])
    front = front_among(task.objectives(predictor), np.unique(genes, axis=0), list(found.pool.history))
    return replace(front, measured=accuracies_of(front.genes, *found.known))
