"""A search for a front that measures: `search.py --mode nsga2 --refine ROUNDS --measure N`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import numpy as np

from apq.experiment import Experiment
from apq.files import Record
from apq.resume import Resume
from apq.search_result import SearchResult
from dataset import image_folder, recorded_folder
from dataset.imagenet import report_unreadable
from elastic_nn.training.distributed import by_first
from elastic_nn.training.session import Execution
from methods.nsga2.front_finder import Front, front_among
from methods.nsga2.front_search import FrontTask, load_task, picked_and_saved
from methods.nsga2.measuring import MEASURED_BY, Measuring
from methods.nsga2.recording import index_of, record_measured
from methods.search.candidates import Pool
from methods.search.predicted import scores_of
from methods.search.refine import REFINED, Refined, Refining, Search, refine
from methods.search.refine_task import check_flags, depends_on, load_refining, warn_of_one_mlp
from utils.predictor_files import Predictor

INNER, STATE = "front", "refine.state.pt"  # of the search of a round, and of the rounds


def refined_search(
    args: argparse.Namespace, experiment: Experiment, execution: Execution
) -> tuple[Front, SearchResult]:
    """Search the front in rounds, measure its pick, and record it. The first process searches, all measure.

    The front is that of the last round's candidates and of all measured subnets, by the predictor that was trained on
    these too. UserError if no point is within --pick; the front is kept.
    """
    check_flags(args)
    by_first(lambda: experiment.check_free(args.overwrite), execution)
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
    front, result = by_first(partial(recorded, task, experiment, refining, found, measuring), execution)
    row = index_of(front, result)
    if np.isnan(front.measured[row]) and sum(len(one.top1) for one in found.rounds) < args.measure:
        top1 = refining.archive.measure(refining.measurement, front.genes[[row]], execution, "pick")
        front = replace(front, measured=np.where(np.arange(len(front.genes)) == row, top1, front.measured))
    if execution.main:
        report_unreadable(measuring.measurement.splits)
        result = record_measured(experiment, front, result)
    return front, result


def search_of(task: FrontTask) -> Search:
    """The search of a round. Each round has a seed of its own."""

    def find(predictor: Predictor, number: int, start: np.ndarray | None, resume: Resume) -> Pool:
        config = replace(task.config, seed=task.config.seed + number)
        front = task.find(predictor, config, resume, start)
        return Pool(genes=front.genes, costs=front.values[:, 1], history=front.history)

    first = next(iter(task.costs.values()))
    return Search(find=find, price=first.predict, one_budget=False, state=INNER)


def recorded(
    task: FrontTask, experiment: Experiment, refining: Refining, found: Refined, measuring: Measuring
) -> tuple[Front, SearchResult]:
    """The refined front with its pick, written into the experiment."""
    predictor, scores, bands = refining.learned()
    front = front_of(task, refining, found, predictor)
    facts: Record = {REFINED: found.record(), MEASURED_BY: measuring.record, **scores_of(scores, bands)}
    searched = task.result(front, {**facts, **recorded_folder(measuring.data)})
    return front, picked_and_saved(experiment, front, searched, task.bounds, more=True)


def front_of(task: FrontTask, refining: Refining, found: Refined, predictor: Predictor) -> Front:
    """The front of the last candidates and of all measured subnets, by this predictor."""
    genes = np.concatenate([found.pool.genes.astype(np.int64), refining.archive.load()[0].astype(np.int64)])
    front = front_among(task.objectives(predictor), np.unique(genes, axis=0), list(found.pool.history))
    return replace(front, measured=refining.archive.measured(front.genes))
