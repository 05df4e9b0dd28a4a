"""A search under one budget that measures: `search.py --refine ROUNDS --measure N`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import numpy as np

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.genes import subnets_of
from apq.resume import Resume
from apq.search_result import SearchResult
from dataset import image_folder, recorded_folder
from dataset.imagenet import report_unreadable
from elastic_nn.training.distributed import by_first
from elastic_nn.training.session import Execution
from methods.evolution.task import EvolutionTask, load_task, save
from methods.search.candidates import Pool
from methods.search.predicted import scores_of
from methods.search.refine import Refined, Refining, Search, refine
from methods.search.refine_report import REFINED
from methods.search.refine_task import check_flags, depends_on, load_refining, warn_of_one_mlp
from utils.predictor_files import Predictor

STATE = "refine.state.pt"


def refined_search(args: argparse.Namespace, experiment: Experiment, execution: Execution) -> SearchResult:
    """Search in rounds and record the best measured subnet. The first process searches, all measure."""
    by_first(lambda: (check_flags(args), experiment.check_free(args.overwrite)), execution)
    task = load_task(args)
    task.check_reachable()  # before the supernet and the images are loaded
    by_first(partial(warn_of_one_mlp, args, task.predictor), execution)
    refining = load_refining(args, task.predictor, execution, args.measure)
    asked = {**task.asked(), **depends_on(refining, args.measure)}
    resume = Resume(experiment.path / STATE, asked, "search", args.overwrite, writes=execution.main)
    found = refine(refining, search_of(task), execution, resume)

    def recorded() -> SearchResult:
        facts = {REFINED: found.record(), **recorded_folder(image_folder(args.data))}
        result = best_measured(task, refining, found, facts)
        save(experiment, result)
        report_unreadable(refining.measurement.splits)
        return result

    return by_first(recorded, execution)


def search_of(task: EvolutionTask) -> Search:
    """The search of a round. Each round has a seed of its own."""

    def find(predictor: Predictor, number: int, start: np.ndarray | None, resume: Resume) -> Pool:
        config = replace(task.config, seed=task.config.seed + number)
        found = task.find(predictor, config, resume, start)
        best = found.genes[: max(2, round(config.parent_ratio * config.population))]  # others are not promising
        return Pool(genes=best, costs=task.cost.predict(best), history=found.history, first=0)

    return Search(find=find, price=task.cost.predict, one_budget=True)


def best_measured(task: EvolutionTask, refining: Refining, found: Refined, facts: Record) -> SearchResult:
    """The result of the most accurate measured subnet within the budget.

    Of equally accurate ones it is the one that the predictor ranks first, after it learned from them. Its prediction
    weighs the measurement, which is noisy, against all others.
    """
    predictor = refining.trained(found.known)
    genes, top1 = refining.measured(found.known, lambda genes: task.cost.predict(genes) <= task.limit)
    if not len(genes):
        raise UserError(f"no measured subnet is within {task.limit:g} {task.cost.unit}; give a larger --measure")
    best = int(np.lexsort((-task.ranking(predictor)(genes), -top1))[0])
    cost = float(task.cost.predict(genes[[best]])[0])
    (subnet,) = subnets_of(task.space, genes[[best]])
    predicted = float(predictor.predict(genes[[best]])[0])
    facts = {**facts, **scores_of(*refining.scores(found.known))}
    result = task.result(subnet, cost, predicted, found.pool.history, facts)
    return replace(result, measured_top1=float(top1[best]))
