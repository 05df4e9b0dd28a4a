"""The work of `search.py --mode nsga2`: search a front or take one that is there, pick a point, record, print."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from apq.cli import listing, table
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.genes import subnets_of
from apq.model_folder import DEFAULT_MODELS
from apq.space import SearchSpace, space_from_dict, space_to_dict
from apq.subnet import Subnet, shown_spec, spec_of
from lut.cost_model import CostModel, cost_model_from_flags, recorded_cost_model
from lut.costs import UNITS, by_scope, cost_rows, network_costs
from lut.population import PopulationCost
from methods.nsga2.config import ACCURACY, OBJECTIVES, Nsga2Config, parse_objectives
from methods.nsga2.front_file import MODE, has_front, load_front, save_front
from methods.nsga2.front_finder import Front, Objective, find_front
from methods.nsga2.front_state import load_front_state
from methods.nsga2.picking import Bound, parse_bounds, pick
from methods.search.budget import Budget, check_reachable
from methods.search.predicted import asked_of, drop_other_state, load_quantized_predictor
from report.plots import plot_predicted_front

CONFIG_FLAGS = ("population", "generations", "crossover_prob", "mutation_prob", "seed")
MOST_SHOWN = 12  # points of a printed front


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A chosen point of a front, the bounds that it was chosen within, and the settings of the search."""

    front: Front
    settings: dict[str, Any]
    bounds: tuple[Bound, ...]
    index: int

    @property
    def names(self) -> list[str]:
        """The objectives."""
        return self.settings["objectives"]

    @property
    def values(self) -> dict[str, float]:
        """The point's objectives by name."""
        return dict(zip(self.names, self.front.values[self.index].tolist(), strict=True))

    @cached_property
    def space(self) -> SearchSpace:
        """The space that was searched."""
        return space_from_dict(self.settings["space"])

    @property
    def subnet(self) -> Subnet:
        """The point itself."""
        return subnets_of(self.space, self.front.genes[self.index : self.index + 1])[0]


def search_or_pick(args: argparse.Namespace) -> None:
    """Search a front, or take one that is there; pick a point, record, print."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    if args.front is not None:
        pick_from(args, Experiment(args.front), experiment)
    elif args.pick is not None and not args.overwrite and has_front(experiment):
        pick_from(args, experiment, experiment)
    elif args.pick is not None and not args.overwrite and experiment.front.exists() and experiment.arch.exists():
        load_front(experiment)  # says why it cannot
    elif args.pick is not None and not _asks_for_a_search(args):
        raise UserError(
            f"{experiment.path} has no front to pick from; search one first: search.py --mode {MODE} "
            f"--objectives {','.join(OBJECTIVES)} --acc_predictor_dir DIR --exp_name {experiment.path.name}"
        )
    else:
        search(args, experiment)


def search(args: argparse.Namespace, experiment: Experiment) -> None:
    """Search the front and pick a point: without --pick, or where nothing fits it, the most accurate."""
    experiment.check_free(args.overwrite)
    given = {name: value for name in CONFIG_FLAGS if (value := getattr(args, name)) is not None}
    config, names = Nsga2Config(**given), parse_objectives(args.objectives)
    bounds = parse_bounds(args.pick, names[1:])
    predictor = load_quantized_predictor(args.acc_predictor_dir)
    space, cost_model = predictor.space, cost_model_from_flags(args.config, args.table)
    scope = args.scope or space.budget_scope
    costs = {name: PopulationCost(space, name, cost_model, scope) for name in names[1:]}
    for bound in bounds:
        cost = costs[bound.name]
        check_reachable(space, Budget(cost=cost.predict, limit=bound.limit, unit=cost.unit), cost.cheapest_genes())
    settings = {
        "mode": MODE,
        "space": space_to_dict(space),
        "acc_predictor_dir": str(args.acc_predictor_dir),
        "objectives": list(names),
        "scope": scope,
        "nsga2": asdict(config),
        **cost_model.record(),
    }
    asked = asked_of(settings, predictor, cost_model)
    if args.overwrite:
        drop_other_state(experiment.front_state, load_front_state, asked)
    objectives = [
        Objective(name=ACCURACY, score=predictor.fast(), maximise=True),
        *(Objective(name=k, score=c.predict, unit=c.unit, cheapest=c.cheapest_genes()) for k, c in costs.items()),
    ]
    with tqdm(total=config.generations, desc="search", disable=None) as bar:
        front = find_front(
            space,
            objectives,
            config,
            lambda record: bar.update(record["generation"] - bar.n),
            state_file=experiment.front_state,
            asked=asked,
        )
    try:
        picked = choose(front, settings, bounds)
    except UserError as error:  # what was searched is kept
        save(experiment, choose(front, settings, ()))
        raise UserError(f"{error}; {experiment.path} has the front, with its most accurate point") from error
    save(experiment, picked)
    report(args.json, experiment, picked, cost_model)


def pick_from(args: argparse.Namespace, origin: Experiment, experiment: Experiment) -> None:
    """Pick a point of a front that is there, into its own experiment or into another."""
    front, settings = load_front(origin)
    cost_model = recorded_cost_model(origin)
    check_agrees(args, origin, settings, cost_model)
    same = origin.path.resolve() == experiment.path.resolve()
    if not same:
        experiment.check_free(args.overwrite)
    elif origin.best_checkpoint.exists() or origin.last_checkpoint.exists():
        raise UserError(
            f"{origin.path} is finetuned; pick into another experiment: --front {origin.path} --exp_name OTHER"
        )
    picked = choose(front, settings, parse_bounds(args.pick, settings["objectives"][1:]))
    if same:  # the front stays where it is, whatever happens
        write_pick(experiment, picked)
    else:
        save(experiment, replace(picked, settings={**settings, "front": str(origin.path)}))
    report(args.json, experiment, picked, cost_model)


def check_agrees(args: argparse.Namespace, origin: Experiment, settings: dict[str, Any], cost_model: CostModel) -> None:
    """UserError if a flag asks for another search than the one that made the front. Flags that are not given agree."""
    asked = {"objectives": args.objectives and list(parse_objectives(args.objectives)), "scope": args.scope}
    asked |= {name: getattr(args, name) for name in CONFIG_FLAGS} | {"seed": args.seed or None}  # 0 is its default
    found = {"objectives": settings["objectives"], "scope": settings["scope"], **settings["nsga2"]}
    different = [name for name, value in asked.items() if value is not None and value != found[name]]
    given = cost_model_from_flags(args.config, args.table) if args.config or args.table else cost_model
    different += ["config or table"] * (given.record() != cost_model.record())
    if args.acc_predictor_dir not in (DEFAULT_MODELS, Path(settings["acc_predictor_dir"])):
        different.append("acc_predictor_dir")
    if different:
        raise UserError(
            f"the front of {origin.path} was searched with another {', '.join(different)}: leave it out to pick from "
            "this front, or search anew under another --exp_name or with --overwrite"
        )


def choose(front: Front, settings: dict[str, Any], bounds: tuple[Bound, ...]) -> Pick:
    """The most accurate point within the bounds."""
    accuracy, *costs = front.values.T
    index = pick(bounds, accuracy, dict(zip(settings["objectives"][1:], costs, strict=True)))
    return Pick(front=front, settings=settings, bounds=bounds, index=index)


def save(experiment: Experiment, picked: Pick) -> None:
    """Write the experiment: the front, and of its chosen point the `arch` that the next scripts take."""
    with experiment.replaced() as new:
        save_front(new, picked.space, picked.names, picked.front)
        write_pick(new, picked)


def write_pick(experiment: Experiment, picked: Pick) -> None:
    """Write what depends on the chosen point, `arch` last: where that was not reached the same pick repeats it."""
    front, values = picked.front, picked.values
    settings = {
        **picked.settings,
        "pick": ",".join(map(str, picked.bounds)) or None,
        "picked": values,
        "predicted_accuracy": values[ACCURACY],
    }
    accuracy, *costs = front.values.T
    shown = dict(zip(picked.names[1:], costs, strict=True))
    plot_predicted_front(accuracy, shown, UNITS, picked.index, experiment.front_plot)
    experiment.save_found(picked.space, picked.subnet, values[picked.names[1]], settings, front.history)


def report(as_json: bool, experiment: Experiment, picked: Pick, cost_model: CostModel) -> None:
    """Print the front, its chosen point and that one's costs."""
    front, settings, space, names = picked.front, picked.settings, picked.space, picked.names
    costs, spec = network_costs(space, picked.subnet, cost_model), spec_of(space, picked.subnet)
    asked = " and ".join(map(str, picked.bounds))
    if as_json:
        shown = {"objectives": names, "scope": settings["scope"], "front": len(front.genes)}
        network = {"costs": {scope: asdict(cost) for scope, cost in costs.items()}, "subnet": spec}
        facts = {"exp_dir": str(experiment.path), "space": space.name, **shown, "pick": asked or None}
        print(json.dumps({**facts, "picked": picked.values, "priced_by": str(cost_model), **network}))
        return
    print(f"{experiment.path}: front of {len(front.genes)} subnets of space {space.name} ({settings['scope']} scope)")
    evenly = np.linspace(0, len(front.genes) - 1, min(MOST_SHOWN, len(front.genes))).round().astype(int).tolist()
    rows = [
        (f"{front.values[i, 0]:.2%}", *(f"{cost:g}" for cost in front.values[i, 1:]), "<-" if i == picked.index else "")
        for i in sorted({*evenly, picked.index})
    ]
    titles = ("predicted top-1", *(f"{name}, {UNITS[name]}" for name in names[1:]), "")
    print(table([titles, *rows]))
    print(f"picked: the most accurate subnet{' with ' + asked if asked else ''}")
    print(listing(shown_spec(space, spec)))
    print(table(cost_rows(by_scope(costs))))
    print(f"latency and energy: {cost_model}")


def _asks_for_a_search(args: argparse.Namespace) -> bool:
    """Whether a flag says which search: a bare --pick with a mistyped --exp_name must not start another one."""
    flags = ("objectives", *CONFIG_FLAGS)
    return args.acc_predictor_dir != DEFAULT_MODELS or any(getattr(args, name) for name in flags)
