"""A search for a front: what the flags say about it, and its result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import SAVE_SECONDS, Record
from apq.genes import subnets_of
from apq.resume import Resume
from apq.search_result import SearchResult, SubnetChoice
from apq.space import SearchSpace
from elastic_nn.training.progress import Progress
from lut.cost_model import CostModel, cost_model_from_flags
from lut.costs import UNITS, check_priced
from lut.population import PopulationCost
from methods.nsga2.config import ACCURACY, NSGA2S, Nsga2Config, parse_objectives
from methods.nsga2.front_finder import Front, Objective, find_front
from methods.nsga2.front_records import MODE, records_of
from methods.nsga2.picking import Bound, parse_bounds
from methods.nsga2.recording import picked, save
from methods.search.budget import Budget, check_reachable
from methods.search.flags import preset_of
from methods.search.predicted import (
    asked_of,
    cautious,
    load_quantized_predictor,
    recorded_scores,
    risk_setting,
    scorer,
    tell_of_measured,
    warn_of_missing_supernet,
)
from utils.predictor_files import Predictor

STATE = "front.state.pt"
CONFIG_FLAGS = ("population", "generations", "crossover_prob", "mutation_prob")


@dataclass(frozen=True, kw_only=True)
class FrontTask:
    """A search for a front. `models` is the folder of its predictor, `costs` are priced by name in their order."""

    predictor: Predictor
    models: Path
    cost_model: CostModel
    scope: str
    costs: Mapping[str, PopulationCost]
    bounds: Sequence[Bound]
    config: Nsga2Config
    risk: float | None
    device: str

    @property
    def space(self) -> SearchSpace:
        return self.predictor.space

    @property
    def settings(self) -> Record:
        """The settings of the search as plain data."""
        return {"objectives": [ACCURACY, *self.costs], "nsga2": asdict(self.config), **risk_setting(self.risk)}

    def asked(self) -> Record:
        """All that the front depends on, as plain data."""
        return asked_of({**self.settings, "scope": self.scope}, self.predictor, self.cost_model)

    def objectives(self, predictor: Predictor) -> list[Objective]:
        """The accuracy by this predictor, and the costs."""
        accuracy = cautious(scorer(predictor, resolve_device(self.device), self.config.population), self.risk)
        return [
            Objective(name=ACCURACY, score=accuracy, maximise=True),
            *(
                Objective(name=name, score=cost.predict, unit=cost.unit, cheapest=cost.cheapest_genes())
                for name, cost in self.costs.items()
            ),
        ]

    def find(self, predictor: Predictor, config: Nsga2Config, resume: Resume, start: np.ndarray | None = None) -> Front:
        """Search the front with this predictor, with progress."""
        with Progress(what="search", total=config.generations, unit="generation") as bar:
            log: Callable[[Record], object] = lambda record: bar.update(record["generation"] - bar.n)  # noqa: E731
            return find_front(self.space, self.objectives(predictor), config, log, resume, start)

    def result(self, front: Front, more: Record) -> SearchResult:
        """The result of a front, before a point is picked. `more` are further settings."""
        names = self.settings["objectives"]
        (first,) = subnets_of(self.space, front.genes[:1])
        return SearchResult(
            method=MODE,
            choice=SubnetChoice(space=self.space, subnet=first, models=self.models),
            cost=float(front.values[0, 1]),
            quantity=names[1],
            unit=UNITS[names[1]],
            scope=self.scope,
            cost_model=self.cost_model.record(),
            settings={**self.settings, **more},
            history=tuple(front.history),
            front=tuple(records_of(self.space, names, front)),
        )


def load_task(args: argparse.Namespace) -> FrontTask:
    """What the flags say. UserError where they do not fit together, or no subnet is within --pick."""
    config, names = preset_of(args, "nsga2", NSGA2S, CONFIG_FLAGS), parse_objectives(args.objectives)
    bounds = parse_bounds(args.pick, names[1:])
    predictor = load_quantized_predictor(args.acc_predictor_dir)
    space, cost_model = predictor.space, cost_model_from_flags(args.config, args.table)
    check_priced(space, cost_model)
    warn_of_missing_supernet(args.acc_predictor_dir)
    scope = args.scope or space.budget_scope
    costs = {name: PopulationCost(space, name, cost_model, scope) for name in names[1:]}
    check_bounds(bounds, costs)
    return FrontTask(
        predictor=predictor,
        models=args.acc_predictor_dir,
        cost_model=cost_model,
        scope=scope,
        costs=costs,
        bounds=bounds,
        config=config,
        risk=args.risk,
        device=args.device,
    )


def search(args: argparse.Namespace, experiment: Experiment) -> tuple[Front, SearchResult]:
    """Search the front, pick a point, without --pick the most accurate one, and record both.

    UserError if no point is within --pick. The front is kept, with its most accurate point picked.
    """
    experiment.check_free(args.overwrite)
    task = load_task(args)
    tell_of_measured(args.acc_predictor_dir)
    resume = Resume(experiment.path / STATE, task.asked(), "search", args.overwrite, every_s=SAVE_SECONDS)
    front = task.find(task.predictor, task.config, resume)
    searched = task.result(front, recorded_scores(args.acc_predictor_dir))
    return front, picked_and_saved(experiment, front, searched, task.bounds, more=args.measure is not None)


def picked_and_saved(
    experiment: Experiment, front: Front, searched: SearchResult, bounds: Sequence[Bound], *, more: bool
) -> SearchResult:
    """Pick a point and record it. UserError if none is within the bounds; then the most accurate one is recorded."""
    try:
        result = picked(searched, front, bounds)
    except UserError as error:
        save(experiment, front, picked(searched, front, ()))
        raise UserError(f"{error}; {experiment.path} has the front, with its most accurate point") from error
    save(experiment, front, result, more=more)
    return result


def check_bounds(bounds: Sequence[Bound], costs: Mapping[str, PopulationCost]) -> None:
    """UserError for a bound that no subnet of the space meets."""
    for bound in bounds:
        cost = costs[bound.name]
        budget = Budget(cost=cost.predict, limit=bound.limit, unit=cost.unit)
        check_reachable(cost.space, budget, cost.cheapest_genes())
