"""The work of `search.py --mode nsga2`: search a front or load one, pick a point, record, print."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
from tqdm import tqdm

from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.files import SAVE_SECONDS
from apq.genes import subnets_of
from apq.model_folder import DEFAULT_MODELS
from apq.provenance import this_run
from apq.resume import Resume, difference
from apq.search_result import SearchResult, SubnetChoice
from lut.cost_model import CostModel, cost_model_from_flags, cost_model_from_record
from lut.costs import UNITS
from lut.population import PopulationCost
from methods.nsga2.config import ACCURACY, OBJECTIVES, Nsga2Config, parse_objectives
from methods.nsga2.front_finder import Front, Objective, find_front
from methods.nsga2.front_records import MODE, has_front, load_front, records_of
from methods.nsga2.picking import Bound, parse_bounds, pick
from methods.search.budget import Budget, check_reachable
from methods.search.predicted import asked_of, load_quantized_predictor
from report.plots import plot_predicted_front
from report.search_report import Heading, report_result

STATE, PLOT = "front.state.pt", "front.png"
CONFIG_FLAGS = ("population", "generations", "crossover_prob", "mutation_prob", "seed")
MOST_SHOWN = 12  # points of a printed front


def search_or_pick(args: argparse.Namespace) -> None:
    """Search a front, or load one; pick a point, record, print."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    if args.front is not None:
        pick_from(args, Experiment(args.front), experiment)
    elif args.pick is not None and not args.overwrite and has_front(experiment):
        pick_from(args, experiment, experiment)
    elif args.pick is not None and not args.overwrite and experiment.front.exists() and experiment.arch.exists():
        load_front(experiment)  # raises the UserError that says why it has no front to pick from
    elif args.pick is not None and not _asks_for_a_search(args):
        raise UserError(
            f"{experiment.path} has no front to pick from; search one first: search.py --mode {MODE} "
            f"--objectives {','.join(OBJECTIVES)} --acc_predictor_dir DIR --exp_name {experiment.path.name}"
        )
    else:
        search(args, experiment)


def search(args: argparse.Namespace, experiment: Experiment) -> None:
    """Search the front and pick a point; without --pick the most accurate one.

    UserError if no point is within --pick. The front is kept, with its most accurate point picked.
    """
    experiment.check_free(args.overwrite)
    given = {name: value for name in CONFIG_FLAGS if (value := getattr(args, name)) is not None}
    config, names = Nsga2Config(**given), parse_objectives(args.objectives)
    bounds = parse_bounds(args.pick, names[1:])
    predictor = load_quantized_predictor(args.acc_predictor_dir)
    space, cost_model = predictor.space, cost_model_from_flags(args.config, args.table)
    scope = args.scope or space.budget_scope
    costs = {name: PopulationCost(space, name, cost_model, scope) for name in names[1:]}
    check_bounds(bounds, costs)
    settings = {"objectives": list(names), "nsga2": asdict(config)}
    asked = asked_of({**settings, "scope": scope}, predictor, cost_model)
    resume = Resume(experiment.path / STATE, asked, "search", args.overwrite, every_s=SAVE_SECONDS)
    objectives = [
        Objective(name=ACCURACY, score=predictor.fast(), maximise=True),
        *(Objective(name=k, score=c.predict, unit=c.unit, cheapest=c.cheapest_genes()) for k, c in costs.items()),
    ]
    with tqdm(total=config.generations, desc="search", disable=None) as bar:
        front = find_front(space, objectives, config, lambda record: bar.update(record["generation"] - bar.n), resume)
    searched = SearchResult(
        method=MODE,
        choice=SubnetChoice(space=space, subnet=subnets_of(space, front.genes[:1])[0], models=args.acc_predictor_dir),
        cost=float(front.values[0, 1]),
        quantity=names[1],
        unit=UNITS[names[1]],
        scope=scope,
        cost_model=cost_model.record(),
        settings=settings,
        history=tuple(front.history),
        front=tuple(records_of(space, names, front)),
    )
    try:
        result = picked(searched, front, bounds)
    except UserError as error:
        save(experiment, front, picked(searched, front, ()))
        raise UserError(f"{error}; {experiment.path} has the front, with its most accurate point") from error
    save(experiment, front, result)
    report(args, experiment, front, result)


def check_bounds(bounds: Sequence[Bound], costs: Mapping[str, PopulationCost]) -> None:
    """UserError for a bound that no subnet of the space meets."""
    for bound in bounds:
        cost = costs[bound.name]
        budget = Budget(cost=cost.predict, limit=bound.limit, unit=cost.unit)
        check_reachable(cost.space, budget, cost.cheapest_genes())


def pick_from(args: argparse.Namespace, origin: Experiment, experiment: Experiment) -> None:
    """Pick a point of the front of `origin`, and record it there or in another experiment."""
    front, searched = load_front(origin)
    check_agrees(args, origin, searched)
    same = origin.path.resolve() == experiment.path.resolve()
    if not same:
        experiment.check_free(args.overwrite)
    elif origin.best_checkpoint.exists() or origin.last_checkpoint.exists():
        raise UserError(
            f"{origin.path} is finetuned; pick into another experiment: --front {origin.path} --exp_name OTHER"
        )
    result = picked(searched, front, parse_bounds(args.pick, searched.settings["objectives"][1:]))
    if same:  # the file of the front is not written again
        with experiment.edited() as new:
            write_pick(new, front, replace(result, front=None, made_by=this_run()))
    else:
        settings = {**result.settings, "front": str(origin.path)}
        result = replace(result, settings=settings, made_by=None)
        save(experiment, front, result)
    report(args, experiment, front, result)


def check_agrees(args: argparse.Namespace, origin: Experiment, searched: SearchResult) -> None:
    """UserError if a flag that is given differs from the search that made the front."""
    flags = {"objectives": args.objectives and list(parse_objectives(args.objectives)), "scope": args.scope}
    flags |= {name: getattr(args, name) for name in CONFIG_FLAGS} | {"seed": args.seed or None}  # 0 is its default
    asked = {name: value for name, value in flags.items() if value is not None}
    facts = {"scope": searched.scope, **searched.settings, **searched.settings["nsga2"]}
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
        settings={**searched.settings, **chosen},
    )


def save(experiment: Experiment, front: Front, result: SearchResult) -> None:
    """Write the experiment: the front, and the `arch` of its chosen point."""
    with experiment.replaced() as new:
        write_pick(new, front, result)


def write_pick(experiment: Experiment, front: Front, result: SearchResult) -> None:
    """Write all that depends on the chosen point."""
    names, accuracy, costs = result.settings["objectives"], front.values[:, 0], front.values[:, 1:].T
    shown = dict(zip(names[1:], costs, strict=True))
    plot_predicted_front(accuracy, shown, UNITS, index_of(front, result), experiment.path / PLOT)
    result.write(experiment)


def index_of(front: Front, result: SearchResult) -> int:
    """Index of the chosen point of the front."""
    values = [result.settings["picked"][name] for name in result.settings["objectives"]]
    return int(np.flatnonzero((front.values == values).all(axis=1))[0])


def report(args: argparse.Namespace, experiment: Experiment, front: Front, result: SearchResult) -> None:
    """Print the front, the chosen point and its costs."""
    names, chosen, n = result.settings["objectives"], index_of(front, result), len(front.genes)
    evenly = np.linspace(0, n - 1, min(MOST_SHOWN, n)).round().astype(int).tolist()
    rows = [
        (f"{front.values[i, 0]:.2%}", *(f"{cost:g}" for cost in front.values[i, 1:]), "<-" if i == chosen else "")
        for i in sorted({*evenly, chosen})
    ]
    titles = ("predicted top-1", *(f"{name}, {UNITS[name]}" for name in names[1:]), "")
    asked = (result.settings["pick"] or "").replace(",", " and ")
    heading = Heading(
        title=f"front of {n} subnets of space {result.found_subnet.space.name} ({result.scope} scope)",
        rows=[titles, *rows],
        choice=f"picked: the most accurate subnet{asked and ' with ' + asked}",
        facts={"objectives": names, "front": n, "pick": asked or None, "picked": result.settings["picked"]},
    )
    report_result(experiment, result, cost_model_of(experiment, result), heading, as_json=args.json)


def _asks_for_a_search(args: argparse.Namespace) -> bool:
    """Whether any flag describes a search: --pick with a mistyped --exp_name must not start one."""
    flags = ("objectives", *CONFIG_FLAGS)
    return args.acc_predictor_dir != DEFAULT_MODELS or any(getattr(args, name) for name in flags)
