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
from methods.nsga2.front_finder import Front, measured_front
from methods.nsga2.front_search import FrontTask, load_task, picked_and_saved
from methods.nsga2.measuring import MEASURED_BY, Measuring
from methods.nsga2.picking import within
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
    """Search the front in rounds and record that of all measured subnets. The first process searches, all measure.

    UserError if no point is within --pick; the front is kept.
    """
    by_first(lambda: (check_flags(args), experiment.check_free(args.overwrite)), execution)
    task = load_task(args)
    by_first(partial(warn_of_one_mlp, args, task.predictor), execution)
    refining = load_refining(args, task.predictor, execution, args.measure)
    measuring = Measuring(
        measurement=refining.measurement,
        most=args.measure,
        data=image_folder(args.data),
        deterministic=args.deterministic,
    )
    asked = {**task.asked(), **depends_on(refining, args.measure)}
    resume = Resume(experiment.path / STATE, asked, "search", args.overwrite, writes=execution.main)
    found = refine(refining, search_of(task), execution, resume)

    def recorded() -> tuple[Front, SearchResult]:
        front = front_of(task, refining, found)
        facts: Record = {REFINED: found.record(), MEASURED_BY: measuring.record}
        facts |= {**scores_of(*refining.scores(found.known)), **recorded_folder(measuring.data)}
        report_unreadable(measuring.measurement.splits)
        return front, picked_and_saved(experiment, front, task.result(front, facts), task.bounds, more=False)

    return by_first(recorded, execution)


def search_of(task: FrontTask) -> Search:
    """The search of a round. Each round has a seed of its own."""

    def find(predictor: Predictor, number: int, start: np.ndarray | None, resume: Resume) -> Pool:
        config = replace(task.config, seed=task.config.seed + number)
        front = task.find(predictor, config, resume, start)
        fits = within(task.bounds, dict(zip(task.costs, front.values[:, 1:].T, strict=True)))
        picked = int(np.argmax(np.where(fits, front.values[:, 0], -np.inf))) if fits.any() else None
        return Pool(genes=front.genes, costs=front.values[:, 1], history=front.history, first=picked)

    first = next(iter(task.costs.values()))
    return Search(find=find, price=first.predict, one_budget=False)


def front_of(task: FrontTask, refining: Refining, found: Refined) -> Front:
    """The front of all measured subnets, with what the predictor that learned from them says."""
    genes, top1 = refining.measured(found.known)
    objectives = task.objectives(refining.trained(found.known))
    return measured_front(objectives, genes, top1, list(found.pool.history))
