"""The work of `search.py --mode evolution`: search, record, print."""

from __future__ import annotations

import argparse

from apq.device import resolve_device
from apq.experiment import Experiment, get_experiment
from apq.files import SAVE_SECONDS
from apq.genes import genes_of
from apq.resume import Resume
from apq.search_result import SearchResult
from elastic_nn.training.distributed import by_first, joined
from elastic_nn.training.session import Execution
from lut.cost_model import cost_model_from_record
from methods.evolution.task import load_task, save
from methods.search.predicted import RISK, beside_prediction, recorded_scores, tell_of_measured
from methods.search.refine_report import beside_refined
from report.search_report import Heading, report_result

STATE = "search.state.pt"


def search(args: argparse.Namespace) -> None:
    """Search, with --refine measure too, record, print. The processes share the measuring."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    with joined(resolve_device(args.device), Execution(deterministic=args.deterministic)) as execution:
        if args.refine is not None:
            from methods.evolution.refining import refined_search  # needs what measures and trains

            result, cautions = refined_search(args, experiment, execution), []
        else:
            result, cautions = by_first(lambda: predicted_search(args, experiment), execution)
        if not execution.main:
            return
    heading = Heading(cautions=cautions, measured="measured" if result.measured_top1 is not None else "")
    heading = beside_refined(beside_prediction(heading, result), result)
    cost_model = cost_model_from_record(result.cost_model, experiment.config)
    report_result(experiment, result, cost_model, heading, as_json=args.json)


def predicted_search(args: argparse.Namespace, experiment: Experiment) -> tuple[SearchResult, list[str]]:
    """Search by predicted accuracy alone and record the result. Returns it with lines to print beside it."""
    experiment.check_free(args.overwrite)
    task = load_task(args)
    tell_of_measured(args.acc_predictor_dir)
    resume = Resume(experiment.path / STATE, task.asked(), "search", args.overwrite, every_s=SAVE_SECONDS)
    found = task.find(task.predictor, task.config, resume)
    risk, predicted, cautions = task.settings.get(RISK), found.accuracy, []
    if risk:
        predicted = float(task.predictor.fast()(genes_of(task.space, [found.subnet]))[0])
        cautions = [f"ranked by less: {found.accuracy:.2%}, {risk:g} spreads lower"]
    result = task.result(found.subnet, found.cost, predicted, found.history, recorded_scores(args.acc_predictor_dir))
    save(experiment, result)
    return result, cautions
