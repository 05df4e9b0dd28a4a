"""The work of `search.py --mode evolution`: search, record, print."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from apq.device import resolve_device
from apq.experiment import get_experiment
from apq.files import SAVE_SECONDS
from apq.genes import genes_of
from apq.resume import Resume
from apq.search_result import SearchResult, SubnetChoice
from elastic_nn.training.progress import Progress
from lut.cost_model import cost_model_from_flags
from lut.costs import check_priced
from lut.population import PopulationCost
from methods.search.evolution_finder import EvolutionFinder
from methods.search.flags import evolution_config
from methods.search.predicted import (
    asked_of,
    beside_prediction,
    cautious,
    load_quantized_predictor,
    recorded_scores,
    risk_setting,
    scorer,
    warn_of_missing_supernet,
)
from report.plots import plot_history
from report.search_report import Heading, report_result

STATE = "search.state.pt"


def search(args: argparse.Namespace) -> None:
    """Load the predictor and the costs, search, record, print."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite)
    config, predictor = evolution_config(args), load_quantized_predictor(args.acc_predictor_dir)
    space, cost_model = predictor.space, cost_model_from_flags(args.config, args.table)
    check_priced(space, cost_model)
    warn_of_missing_supernet(args.acc_predictor_dir)
    cost = PopulationCost(space, args.type, cost_model, args.scope or space.budget_scope)
    fast = scorer(predictor, resolve_device(args.device), config.population)
    accuracy, risk = cautious(fast, args.risk), risk_setting(args.risk)
    finder = EvolutionFinder(space, accuracy, cost.predict, args.constraint, config, cost.cheapest_genes(), cost.unit)
    settings = {"constraint": args.constraint, "type": args.type, "scope": cost.scope, "evolution": asdict(config)}
    asked = asked_of({**settings, **risk}, predictor, cost_model)
    resume = Resume(experiment.path / STATE, asked, "search", args.overwrite, every_s=SAVE_SECONDS)
    with Progress(what="search", total=config.generations, unit="generation") as bar:
        found = finder.run(lambda record: bar.update(record["generation"] - bar.n), resume)
    result = SearchResult(
        method="evolution",
        choice=SubnetChoice(space=space, subnet=found.subnet, models=args.acc_predictor_dir),
        cost=found.cost,
        quantity=cost.quantity,
        unit=cost.unit,
        limit=args.constraint,
        scope=cost.scope,
        predicted_top1=float(fast(genes_of(space, [found.subnet]))[0]) if risk else found.accuracy,
        cost_model=cost_model.record(),
        settings={"evolution": asdict(config), **risk, **recorded_scores(args.acc_predictor_dir)},
        history=tuple(found.history),
    )
    with experiment.replaced() as new:
        result.write(new)
        budget = {"constraint": args.constraint, "quantity": cost.quantity, "unit": cost.unit}
        plot_history(found.history, new.path / "history.png", **budget)
    heading = Heading(cautions=[f"ranked by less: {found.accuracy:.2%}, {args.risk:g} spreads lower"] if risk else ())
    report_result(experiment, result, cost_model, beside_prediction(heading, result), as_json=args.json)
