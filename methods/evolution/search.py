"""The work of `search.py --mode evolution`: from flags to an experiment and what is printed of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from apq.cli import listing, table
from apq.experiment import Experiment, get_experiment
from apq.space import SearchSpace, space_to_dict
from apq.subnet import shown_spec, spec_of
from lut.cost_model import CostModel, cost_model_from_flags
from lut.costs import by_scope, cost_rows, network_costs
from lut.population import PopulationCost
from methods.search.evolution_finder import EvolutionFinder, Found
from methods.search.flags import evolution_config
from methods.search.predicted import asked_of, drop_other_state, load_quantized_predictor
from methods.search.search_state import load_state
from report.plots import plot_history


def search(args: argparse.Namespace) -> None:
    """Load predictor and costs, evolve, record, print."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite)
    config, quantity = evolution_config(args), args.type
    predictor = load_quantized_predictor(args.acc_predictor_dir)
    space = predictor.space
    scope = args.scope or space.budget_scope
    cost_model = cost_model_from_flags(args.config, args.table)
    cost = PopulationCost(space, quantity, cost_model, scope)
    finder = EvolutionFinder(
        space, predictor.fast(), cost.predict, args.constraint, config, cost.cheapest_genes(), cost.unit
    )
    settings = {
        "space": space_to_dict(space),
        "acc_predictor_dir": str(args.acc_predictor_dir),
        "constraint": args.constraint,
        "type": quantity,
        "unit": cost.unit,
        "scope": scope,
        "evolution": asdict(config),
        **cost_model.record(),
    }
    asked = asked_of(settings, predictor, cost_model)
    if args.overwrite:
        drop_other_state(experiment.search_state, load_state, asked)
    with tqdm(total=config.generations, desc="search", disable=None) as bar:
        found = finder.run(
            lambda record: bar.update(record["generation"] - bar.n), state_file=experiment.search_state, asked=asked
        )
    settings["predicted_accuracy"] = found.accuracy
    with experiment.replaced() as new:
        new.save_found(space, found.subnet, found.cost, settings, found.history)
        plot_history(found.history, new.plot, constraint=args.constraint, quantity=quantity, unit=cost.unit)
    report(args, experiment, space, found, settings, cost_model)


def report(
    args: argparse.Namespace,
    experiment: Experiment,
    space: SearchSpace,
    found: Found,
    settings: dict[str, Any],
    cost_model: CostModel,
) -> None:
    """Print the found subnet, its predicted accuracy and its costs."""
    costs, spec = network_costs(space, found.subnet, cost_model), spec_of(space, found.subnet)
    if args.json:
        shown = {key: settings[key] for key in ("constraint", "type", "unit", "scope", "predicted_accuracy")}
        network = {"costs": {scope: asdict(cost) for scope, cost in costs.items()}, "subnet": spec}
        print(json.dumps({"space": space.name, **shown, "cost": found.cost, "priced_by": str(cost_model), **network}))
        return
    unit = settings["unit"]
    print(f"{experiment.path}: best subnet of space {space.name} for {settings['type']} <= {args.constraint:g} {unit}")
    print(listing(shown_spec(space, spec)))
    print(f"predicted top-1 {found.accuracy:.2%}; {settings['type']} {found.cost:g} {unit} ({settings['scope']} scope)")
    print(table(cost_rows(by_scope(costs))))
    print(f"latency and energy: {cost_model}")
