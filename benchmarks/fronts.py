"""Is one search for the whole front as good at each budget as a search for that budget alone?

For each seed NSGA-II runs once, and an evolution runs for each of five budgets ("separate"). Both use the predictor of
--models. The budgets are spaced evenly in the logarithm, between the cheapest and the most accurate point of the first
seed's front. With the default flags the evolutions together evaluate about as many candidates as NSGA-II.

The table has the predicted accuracy at each budget, and hypervolumes: of the whole front, of its points at the five
budgets, and of the subnets that the evolutions found. Only the last two have the same number of points. A hypervolume
is a share of the area from accuracy 0 to 1 and from no cost to the largest budget.

If the supernet beside the predictor was trained quantized, the points are also measured on the test images, without a
finetune.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from pymoo.indicators.hv import HV
from tqdm import tqdm

from apq.cli import Parser, run
from apq.device import resolve_device
from apq.genes import genes_of, subnets_of
from apq.model_folder import ModelFolder
from benchmarks.markdown import markdown
from dataset import load_splits
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.training.pairs import subnet_top1
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from lut.bitfusion import BitFusion
from lut.costs import UNITS
from lut.population import PopulationCost
from methods.evolution.evolution_finder import EvolutionConfig, EvolutionFinder
from methods.nsga2.front_finder import Front, Nsga2Config, Objective, find_front
from methods.nsga2.picking import Bound, pick
from utils.fast_predictor import FastPredictor
from utils.predictor_files import load_predictor


@dataclass(frozen=True)
class Points:
    """What one method found at each budget, and how many candidates it evaluated."""

    genes: np.ndarray  # (budgets, genes)
    costs: np.ndarray  # (budgets,)
    accuracies: np.ndarray  # (budgets,)
    evaluated: int
    seconds: float  # of processor time


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/qfa-mbv3-glyphs"), help="folder of the predictors")
    parser.add_argument("--cost", choices=tuple(UNITS), default="latency", help="the quantity that the budgets limit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--n_budgets", type=int, default=5, help="budgets; an evolution runs for each")
    parser.add_argument("--population", type=int, default=500, help="of NSGA-II")
    parser.add_argument("--generations", type=int, default=1000, help="of NSGA-II")
    parser.add_argument("--evolution_population", type=int, default=500, help="of each evolution")
    parser.add_argument("--evolution_generations", type=int, default=200, help="of each evolution")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    predictor = load_predictor(ModelFolder(args.models).acc_quant)
    space, accuracy = predictor.space, predictor.fast()
    cost = PopulationCost(space, args.cost, BitFusion(), space.budget_scope)
    budgets, rows, found = np.zeros(0), [], []
    for seed in tqdm(args.seeds, disable=None):
        config = Nsga2Config(population=args.population, generations=args.generations, seed=seed)
        front, seconds = front_of(accuracy, cost, config)
        if not len(budgets):
            low, high = np.log(front.values[[0, -1], 1])
            budgets = np.exp(np.linspace(low, high, args.n_budgets + 1))[1:]
        at_budgets = points_of(front, budgets, seconds)
        evolution = EvolutionConfig(
            population=args.evolution_population, generations=args.evolution_generations, seed=seed
        )
        separate = evolutions(accuracy, cost, budgets, evolution)
        whole = hypervolume(front.values[:, 1], front.values[:, 0], budgets[-1])
        for name, points, all_points in (("NSGA-II", at_budgets, f"{whole:.4f}"), ("separate", separate, "")):
            found.append(points)
            volume = hypervolume(points.costs, points.accuracies, budgets[-1])
            of_points = (f"{100 * value:.2f}" for value in points.accuracies)
            work = (f"{points.evaluated:,}", f"{points.seconds:.1f}")
            rows.append((seed, name, *of_points, all_points, f"{volume:.4f}", *work))
    titles = [f"<= {budget:.4g}" for budget in budgets]
    print(f"Predicted top-1 (%) of {space.name} at each budget of {args.cost} ({cost.unit}), and hypervolume:\n")
    volumes = ("volume, front", "volume, points")
    print(markdown(("seed", "search", *titles, *volumes, "evaluated", "processor, s"), rows))
    if (top1 := measured(ModelFolder(args.models), found)) is not None:
        print("\nMeasured on the test images, without a finetune:\n")
        measured_rows = [
            (*row[:2], *(f"{100 * value:.2f}" for value in of)) for row, of in zip(rows, top1, strict=True)
        ]
        print(markdown(("seed", "search", *titles), measured_rows))


def front_of(accuracy: FastPredictor, cost: PopulationCost, config: Nsga2Config) -> tuple[Front, float]:
    """The front of one search, and the processor seconds that it took."""
    started = time.process_time()
    objectives = [
        Objective(name="accuracy", score=accuracy, maximise=True),
        Objective(name=cost.quantity, score=cost.predict, unit=cost.unit, cheapest=cost.cheapest_genes()),
    ]
    front = find_front(cost.space, objectives, config)
    return front, time.process_time() - started


def points_of(front: Front, budgets: np.ndarray, seconds: float) -> Points:
    """The most accurate point of a front within each budget."""
    accuracies, costs = front.values.T
    chosen = [pick((Bound("cost", float(budget)),), accuracies, {"cost": costs}) for budget in budgets]
    return Points(front.genes[chosen], costs[chosen], accuracies[chosen], front.history[-1]["evaluated"], seconds)


def evolutions(accuracy: FastPredictor, cost: PopulationCost, budgets: np.ndarray, config: EvolutionConfig) -> Points:
    """The subnet that a separate search finds for each budget."""
    started = time.process_time()
    found = [
        EvolutionFinder(
            cost.space, accuracy, cost.predict, float(budget), config, cost.cheapest_genes(), cost.unit
        ).run()
        for budget in budgets
    ]
    return Points(
        genes_of(cost.space, [one.subnet for one in found]),
        np.array([one.cost for one in found]),
        np.array([one.accuracy for one in found]),
        sum(one.history[-1]["evaluated"] for one in found),
        time.process_time() - started,
    )


def measured(folder: ModelFolder, found: Sequence[Points]) -> np.ndarray | None:
    """(methods and seeds, budgets) test top-1 of the points, without a finetune; None without a quantized supernet."""
    if not folder.supernet.exists():
        return None
    supernet, origin = load_supernet(folder.supernet)
    if not supernet.scheme.quantizes:
        return None
    space, device = supernet.space, resolve_device("auto")
    session = Session(splits=load_splits(space), device=device)
    n_images = get_recipe(origin.recipe, space).recalibration_images
    subnets = [subnet for points in found for subnet in subnets_of(space, points.genes)]
    top1 = [
        subnet_top1(supernet.to(device), subnet, session, session.splits.test, n_images)
        for subnet in tqdm(subnets, desc="measured", disable=None)
    ]
    return np.array(top1).reshape(len(found), -1)


def hypervolume(costs: np.ndarray, accuracies: np.ndarray, largest: float) -> float:
    """Share of the area that the points dominate, from no cost to the largest and from accuracy 0 to 1."""
    return float(HV(ref_point=np.array([1.0, 0.0]))(np.stack([costs / largest, -accuracies], axis=1)))


if __name__ == "__main__":
    run(main)
