"""A search under one budget: what the flags say about it, and its result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from apq.device import resolve_device
from apq.experiment import Experiment
from apq.files import Record
from apq.resume import NOT_KEPT, Resume
from apq.search_result import SearchResult, SubnetChoice
from apq.space import SearchSpace
from apq.subnet import Subnet
from elastic_nn.training.progress import Progress
from lut.cost_model import CostModel, cost_model_from_flags
from lut.costs import check_priced
from lut.population import PopulationCost
from methods.search.budget import Budget, check_reachable
from methods.search.evolution_finder import EvolutionConfig, EvolutionFinder, Found
from methods.search.flags import evolution_config
from methods.search.predicted import (
    asked_of,
    cautious,
    load_quantized_predictor,
    risk_setting,
    scorer,
    warn_of_missing_supernet,
)
from report.plots import plot_history
from utils.predictor_files import Predictor


@dataclass(frozen=True, kw_only=True)
class EvolutionTask:
    """A search for the most accurate subnet whose cost is at most `limit`. `models` is the predictor's folder."""

    predictor: Predictor
    models: Path
    cost: PopulationCost
    cost_model: CostModel
    limit: float
    config: EvolutionConfig
    risk: float | None = None
    device: str = "cpu"

    @property
    def space(self) -> SearchSpace:
        return self.predictor.space

    @property
    def settings(self) -> Record:
        """The method's own settings as plain data."""
        return {"evolution": asdict(self.config), **risk_setting(self.risk)}

    def asked(self) -> Record:
        """All that the result depends on, as plain data."""
        budget = {"constraint": self.limit, "type": self.cost.quantity, "scope": self.cost.scope}
        return asked_of({**budget, **self.settings}, self.predictor, self.cost_model)

    def ranking(self, predictor: Predictor) -> Callable[[np.ndarray], np.ndarray]:
        """What candidates are ranked by, with this predictor."""
        return cautious(scorer(predictor, resolve_device(self.device), self.config.population), self.risk)

    def check_reachable(self) -> None:
        """UserError where no subnet is within the budget."""
        budget = Budget(cost=self.cost.predict, limit=self.limit, unit=self.cost.unit)
        check_reachable(self.space, budget, self.cost.cheapest_genes())

    def find(
        self,
        predictor: Predictor,
        config: EvolutionConfig,
        resume: Resume = NOT_KEPT,
        start: np.ndarray | None = None,
    ) -> Found:
        """Search with this predictor, with progress. UserError where no subnet is within the budget."""
        cost, ranking = self.cost, self.ranking(predictor)
        within = (cost.predict, self.limit, config, cost.cheapest_genes(), cost.unit)
        finder = EvolutionFinder(self.space, ranking, *within, start)
        with Progress(what="search", total=config.generations, unit="generation") as bar:
            return finder.run(lambda record: bar.update(record["generation"] - bar.n), resume)

    def result(self, subnet: Subnet, cost: float, top1: float, history: Sequence[Record], more: Record) -> SearchResult:
        """The result that chooses a subnet, with its cost and predicted top-1. `more` are further settings."""
        return SearchResult(
            method="evolution",
            choice=SubnetChoice(space=self.space, subnet=subnet, models=self.models),
            cost=cost,
            quantity=self.cost.quantity,
            unit=self.cost.unit,
            limit=self.limit,
            scope=self.cost.scope,
            predicted_top1=top1,
            cost_model=self.cost_model.record(),
            settings={**self.settings, **more},
            history=tuple(history),
        )


def load_task(args: argparse.Namespace) -> EvolutionTask:
    """What the flags say. UserError where they do not fit together."""
    config, predictor = evolution_config(args), load_quantized_predictor(args.acc_predictor_dir)
    space, cost_model = predictor.space, cost_model_from_flags(args.config, args.table)
    check_priced(space, cost_model)
    warn_of_missing_supernet(args.acc_predictor_dir)
    return EvolutionTask(
        predictor=predictor,
        models=args.acc_predictor_dir,
        cost=PopulationCost(space, args.type, cost_model, args.scope or space.budget_scope),
        cost_model=cost_model,
        limit=args.constraint,
        config=config,
        risk=args.risk,
        device=args.device,
    )


def save(experiment: Experiment, result: SearchResult) -> None:
    """Write the experiment, with a picture of the search."""
    with experiment.replaced() as new:
        result.write(new)
        budget = {"constraint": result.limit, "quantity": result.quantity, "unit": result.unit}
        plot_history(list(result.history), new.path / "history.png", **budget)
