"""The work of `search.py --mode nsga2`: search a front or load one, pick a point, measure points, record, print."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.files import SAVE_SECONDS
from apq.genes import subnets_of
from apq.model_folder import DEFAULT_MODELS
from apq.provenance import this_run
from apq.resume import Resume, difference
from apq.search_result import SearchResult, SubnetChoice
from dataset.imagenet import report_unreadable
from elastic_nn.training.distributed import by_first, joined
from elastic_nn.training.progress import Progress
from elastic_nn.training.session import Execution
from lut.cost_model import CostModel, cost_model_from_flags, cost_model_from_record
from lut.costs import UNITS, check_priced
from lut.population import PopulationCost
from methods.nsga2.config import ACCURACY, NSGA2S, OBJECTIVES, parse_objectives
from methods.nsga2.front_finder import Front, Objective, find_front
from methods.nsga2.front_records import MODE, has_front, load_front, measured_of, records_of, with_records
from methods.nsga2.front_report import beside_measured, front_rows
from methods.nsga2.measuring import (
    Measuring,
    how_measured,
    load_measuring,
    measured_front,
    remove_journal,
    unmeasured,
)
from methods.nsga2.picking import Bound, parse_bounds, pick
from methods.search.budget import Budget, check_reachable
from methods.search.flags import preset_of
from methods.search.predicted import (
    asked_of,
    beside_prediction,
    cautious,
    load_quantized_predictor,
    ranking_line,
    recorded_scores,
    risk_setting,
    scorer,
    warn_of_missing_supernet,
)
from report.plots import plot_predicted_front
from report.search_report import Heading, report_result

STATE, PLOT = "front.state.pt", "front.png"
CONFIG_FLAGS = ("population", "generations", "crossover_prob", "mutation_prob")


def search_or_pick(args: argparse.Namespace) -> None:
    """Search a front, or load one; pick a point, measure points, record, print. The processes share the measuring."""
    if args.measure is None and (args.finetune_epochs or args.recipe or args.data or args.deterministic):
        raise UserError("--finetune_epochs, --recipe, --data and --deterministic belong to --measure")
    experiment = get_experiment(args.exp_name, args.exp_dir)
    with joined(resolve_device(args.device), Execution(deterministic=args.deterministic)) as execution:
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


def search(args: argparse.Namespace, experiment: Experiment) -> tuple[Front, SearchResult]:
    """Search the front, pick a point, without --pick the most accurate one, and record both.

    UserError if no point is within --pick. The front is kept, with its most accurate point picked.
    """
    experiment.check_free(args.overwrite)
    config, names = preset_of(args, "nsga2", NSGA2S, CONFIG_FLAGS), parse_objectives(args.objectives)
    bounds = parse_bounds(args.pick, names[1:])
    predictor = load_quantized_predictor(args.acc_predictor_dir)
    space, cost_model = predictor.space, cost_model_from_flags(args.config, args.table)
    check_priced(space, cost_model)
    warn_of_missing_supernet(args.acc_predictor_dir)
    scope = args.scope or space.budget_scope
    costs = {name: PopulationCost(space, name, cost_model, scope) for name in names[1:]}
    check_bounds(bounds, costs)
    settings = {"objectives": list(names), "nsga2": asdict(config), **risk_setting(args.risk)}
    asked = asked_of({**settings, "scope": scope}, predictor, cost_model)
    resume = Resume(experiment.path / STATE, asked, "search", args.overwrite, every_s=SAVE_SECONDS)
    accuracy = cautious(scorer(predictor, resolve_device(args.device), config.population), args.risk)
    objectives = [
        Objective(name=ACCURACY, score=accuracy, maximise=True),
        *(Objective(name=k, score=c.predict, unit=c.unit, cheapest=c.cheapest_genes()) for k, c in costs.items()),
    ]
    with Progress(what="search", total=config.generations, unit="generation") as bar:
        front = find_front(space, objectives, config, lambda record: bar.update(record["generation"] - bar.n), resume)
    searched = SearchResult(
        method=MODE,
        choice=SubnetChoice(space=space, subnet=subnets_of(space, front.genes[:1])[0], models=args.acc_predictor_dir),
        cost=float(front.values[0, 1]),
        quantity=names[1],
        unit=UNITS[names[1]],
        scope=scope,
        cost_model=cost_model.record(),
        settings={**settings, **recorded_scores(args.acc_predictor_dir)},
        history=tuple(front.history),
        front=tuple(records_of(space, names, front)),
    )
    try:
        result = picked(searched, front, bounds)
    except UserError as error:
        save(experiment, front, picked(searched, front, ()))
        raise UserError(f"{error}; {experiment.path} has the front, with its most accurate point") from error
    save(experiment, front, result, more=args.measure is not None)
    return front, result


def check_bounds(bounds: Sequence[Bound], costs: Mapping[str, PopulationCost]) -> None:
    """UserError for a bound that no subnet of the space meets."""
    for bound in bounds:
        cost = costs[bound.name]
        budget = Budget(cost=cost.predict, limit=bound.limit, unit=cost.unit)
        check_reachable(cost.space, budget, cost.cheapest_genes())


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


def cost_model_of(experiment: Experiment, result: SearchResult) -> CostModel:
    """The cost model of the search."""
    return cost_model_from_record(result.cost_model, experiment.config)


def picked(searched: SearchResult, front: Front, bounds: tuple[Bound, ...]) -> SearchResult:
    """The result whose choice is the most accurate point within the bounds. UserError if none is within them."""
    names = searched.settings["objectives"]
    accuracy, *costs = front.values.T
    index = pick(bounds, accuracy, dict(zip(names[1:], costs, strict=True)))
    values, space = front.values[index].tolist(), searched.found_subnet.space
    (subnet,) = subnets_of(space, front.genes[index : index + 1])
    chosen = {"pick": ",".join(map(str, bounds)) or None, "picked": dict(zip(names, values, strict=True))}
    return replace(
        searched,
        choice=replace(searched.found_subnet, subnet=subnet),
        cost=values[1],
        predicted_top1=values[0],
        measured_top1=measured_of(front, index),
        settings={**searched.settings, **chosen},
    )


def save(experiment: Experiment, front: Front, result: SearchResult, *, more: bool = False) -> None:
    """Write the experiment: the front, and the `arch` of its chosen point. With `more`, points are measured next."""
    with experiment.replaced(more=more) as new:
        write_pick(new, front, result)


def record_measured(experiment: Experiment, front: Front, result: SearchResult) -> SearchResult:
    """Write the measured values into the experiment. Returns the result with that of its point."""
    result = replace(with_records(front, result), measured_top1=measured_of(front, index_of(front, result)))
    with experiment.edited() as new:
        remove_journal(new)
        write_pick(new, front, result)
    return result


def write_pick(experiment: Experiment, front: Front, result: SearchResult) -> None:
    """Write all that depends on the chosen point."""
    names, accuracy, costs = result.settings["objectives"], front.values[:, 0], front.values[:, 1:].T
    shown = dict(zip(names[1:], costs, strict=True))
    plot_predicted_front(accuracy, shown, UNITS, index_of(front, result), experiment.path / PLOT, front.measured)
    result.write(experiment)


def index_of(front: Front, result: SearchResult) -> int:
    """Index of the chosen point of the front."""
    values = [result.settings["picked"][name] for name in result.settings["objectives"]]
    return int(np.flatnonzero((front.values == values).all(axis=1))[0])


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
    if measured:
        heading = beside_measured(heading, front, measured, how_measured(result.settings))
    report_result(experiment, result, cost_model_of(experiment, result), heading, as_json=args.json)


def _asks_for_a_search(args: argparse.Namespace) -> bool:
    """Whether any flag describes a search: --pick with a mistyped --exp_name must not start one."""
    flags = ("objectives", "nsga2", "seed", "risk", *CONFIG_FLAGS)
    return args.acc_predictor_dir != DEFAULT_MODELS or any(getattr(args, name) for name in flags)
