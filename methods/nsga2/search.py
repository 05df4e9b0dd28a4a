"""The work of `search.py --mode nsga2`: search a front or load one, pick a point, measure points, print."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.model_folder import DEFAULT_MODELS
from apq.provenance import this_run
from apq.resume import difference
from apq.search_result import SearchResult
from dataset.imagenet import report_unreadable
from elastic_nn.training.distributed import by_first, joined
from elastic_nn.training.session import Execution
from lut.cost_model import cost_model_from_flags
from methods.nsga2.config import NSGA2S, OBJECTIVES, parse_objectives
from methods.nsga2.front_finder import Front
from methods.nsga2.front_records import MODE, has_front, load_front, with_records
from methods.nsga2.front_report import beside_measured, front_rows
from methods.nsga2.front_search import CONFIG_FLAGS, search
from methods.nsga2.measuring import Measuring, how_measured, load_measuring, measured_front, unmeasured
from methods.nsga2.picking import parse_bounds
from methods.nsga2.recording import cost_model_of, index_of, picked, record_measured, save, write_pick
from methods.nsga2.refining import refined_search
from methods.search.flags import preset_of
from methods.search.predicted import beside_prediction, ranking_line
from methods.search.refine_report import REFINED, beside_refined
from report.search_report import Heading, report_result


def search_or_pick(args: argparse.Namespace) -> None:
    """Search a front, or load one; pick a point, measure points, record, print. The processes share the measuring."""
    if args.measure is None and (args.finetune_epochs or args.recipe or args.data or args.deterministic):
        raise UserError("--finetune_epochs, --recipe, --data and --deterministic belong to --measure")
    if args.refine is not None and (args.front is not None or args.finetune_epochs):
        raise UserError("--refine searches anew, and measures as pairs are: it has no --front and no --finetune_epochs")
    experiment = get_experiment(args.exp_name, args.exp_dir)
    with joined(resolve_device(args.device), Execution(deterministic=args.deterministic)) as execution:
        if args.refine is not None:
            front, result = refined_search(args, experiment, execution)
            if execution.main:
                report(args, experiment, front, result)
            return
        origin = by_first(lambda: origin_of_front(args, experiment), execution)
        measuring = None if args.measure is None else load_measuring(args, origin)

        def found() -> tuple[Front, SearchResult]:
            if origin is None:
                return search(args, experiment)
            return pick_from(args, origin, experiment, measuring)

        front, result = by_first(found, execution)
        if measuring is not None:
            front, result = measured_front(measuring, experiment, front, result, execution)
        if not execution.main:
            return
    if measuring is not None:
        report_unreadable(measuring.measurement.splits)
        result = record_measured(experiment, front, result)
    report(args, experiment, front, result)


def origin_of_front(args: argparse.Namespace, experiment: Experiment) -> Experiment | None:
    """The experiment whose front is loaded; None: a front is searched. UserError where a pick has no front."""
    if args.front is not None:
        return Experiment(args.front)
    if (args.pick is None and args.measure is None) or args.overwrite:
        return None
    if has_front(experiment):
        return experiment
    if experiment.front.exists() and experiment.arch.exists():
        load_front(experiment)  # raises the UserError that says why it has no front to pick from
    if not _asks_for_a_search(args):
        what = "measure" if args.pick is None else "pick from"
        raise UserError(
            f"{experiment.path} has no front to {what}; search one first: search.py --mode {MODE} "
            f"--objectives {','.join(OBJECTIVES)} --acc_predictor_dir DIR --exp_name {experiment.path.name}"
        )
    return None


def pick_from(
    args: argparse.Namespace, origin: Experiment, experiment: Experiment, measuring: Measuring | None
) -> tuple[Front, SearchResult]:
    """Pick a point of the front of `origin`, and record it there or in another experiment.

    A front that is only measured keeps its point. Values that were measured in another way are not copied.
    """
    front, searched = load_front(origin)
    check_agrees(args, origin, searched)
    same = origin.path.resolve() == experiment.path.resolve()
    if same and measuring is not None and args.pick is None:
        return front, searched
    if not same:
        experiment.check_free(args.overwrite)
        if measuring is not None and measuring.differs(searched):
            front, searched = unmeasured(front, searched)
            searched = with_records(front, searched)
    elif origin.best_checkpoint.exists() or origin.last_checkpoint.exists():
        raise UserError(
            f"{origin.path} is finetuned; pick into another experiment: --front {origin.path} --exp_name OTHER"
        )
    result = picked(searched, front, parse_bounds(args.pick, searched.settings["objectives"][1:]))
    if same:  # the file of the front is not written again
        result = replace(result, made_by=this_run())
        with experiment.edited(more=measuring is not None) as new:
            new.drop_exported()
            write_pick(new, front, replace(result, front=None))
    else:
        settings = {**result.settings, "front": str(origin.path)}
        result = replace(result, settings=settings, made_by=None)
        save(experiment, front, result, more=measuring is not None)
    return front, result


def check_agrees(args: argparse.Namespace, origin: Experiment, searched: SearchResult) -> None:
    """UserError if a flag that is given differs from the search that made the front."""
    flags = {"objectives": args.objectives and list(parse_objectives(args.objectives)), "scope": args.scope}
    preset = args.nsga2 and preset_of(args, "nsga2", NSGA2S, CONFIG_FLAGS)
    flags |= {name: getattr(preset or args, name) for name in CONFIG_FLAGS}
    flags |= {"seed": args.seed or None, "risk": args.risk}  # seed 0: default
    asked = {name: value for name, value in flags.items() if value is not None}
    facts = {"scope": searched.scope, "risk": None, **searched.settings, **searched.settings["nsga2"]}
    found = {name: facts[name] for name in asked}
    if args.config or args.table:
        asked["cost model"] = cost_model_from_flags(args.config, args.table).digest()
        found["cost model"] = cost_model_of(origin, searched).digest()
    if args.acc_predictor_dir != DEFAULT_MODELS:
        asked["acc_predictor_dir"], found["acc_predictor_dir"] = args.acc_predictor_dir, searched.found_subnet.models
    if differs := difference(found, asked):
        raise UserError(
            f"the front of {origin.path} is of another search: {differs}; leave the flag out to pick from this front, "
            "or search anew under another --exp_name or with --overwrite"
        )


def report(args: argparse.Namespace, experiment: Experiment, front: Front, result: SearchResult) -> None:
    """Print the front, the chosen point and its costs."""
    names, n = result.settings["objectives"], len(front.genes)
    asked = (result.settings["pick"] or "").replace(",", " and ")
    measured = np.flatnonzero(~np.isnan(front.measured)).tolist()
    heading = Heading(
        title=f"front of {n} subnets of space {result.found_subnet.space.name} ({result.scope} scope)",
        rows=front_rows(front, names, index_of(front, result), measured),
        choice=f"picked: the most accurate subnet{asked and ' with ' + asked}",
        measured="measured" if measured else "",
        facts={"objectives": names, "front": n, "pick": asked or None, "picked": result.settings["picked"]},
    )
    heading = replace(heading, cautions=ranking_line(result.settings))
    heading = beside_prediction(heading, result)
    heading = beside_refined(heading, result)
    if measured:
        how, learned = how_measured(result.settings), REFINED in result.settings
        heading = beside_measured(heading, front, measured, how, learned=learned)
    report_result(experiment, result, cost_model_of(experiment, result), heading, as_json=args.json)


def _asks_for_a_search(args: argparse.Namespace) -> bool:
    """Whether any flag describes a search: --pick with a mistyped --exp_name must not start one."""
    flags = ("objectives", "nsga2", "seed", "risk", *CONFIG_FLAGS)
    return args.acc_predictor_dir != DEFAULT_MODELS or any(getattr(args, name) for name in flags)
