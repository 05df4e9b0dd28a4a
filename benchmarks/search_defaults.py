"""Which settings of evolutionary search find the most accurate subnets, at equal numbers of candidates?

Every setting searches several spaces under three budgets, with several seeds: digits and glyphs with their shipped
predictors, apq-imagenet and qfa-mbv3 with predictors of fixed random weights. Budgets are quantiles of the latency of
random subnets. A space and a budget are a cell.

How far a search falls short is the best predicted accuracy that any search of its cell has found minus its own, in
standard deviations of the predictions of random subnets of the space, so that spaces compare. The first table has, for
every setting, its mean over all cells and seeds, that of the worst cell, and the spread: the standard deviation over
seeds, as a mean over cells. The second table has the predicted accuracies themselves, mean and spread, cell by cell.

With --log a killed run continues, and further settings are added to those that the file has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from apq.cli import Parser, run
from apq.errors import UserError
from apq.files import Record, append_jsonl, read_jsonl
from apq.genes import sample
from apq.model_folder import ModelFolder
from apq.presets import get_space
from benchmarks.markdown import markdown
from lut.bitfusion import BitFusion
from lut.population import PopulationCost
from methods.evolution.evolution_finder import EvolutionConfig, EvolutionFinder
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_files import load_predictor

SPACES = {"digits": None, "glyphs": None, "apq-imagenet": 400, "qfa-mbv3": 600}  # -> width of a random predictor
QUANTILES = (0.1, 0.3, 0.6)
N_RANDOM = 10_000  # random subnets, for budgets and standard deviations

Setting = tuple[int, float, float, float]  # population, mutation_prob, parent_ratio, mutation_ratio
SETTINGS: tuple[Setting, ...] = (
    (100, 0.1, 0.25, 0.5),  # as published
    (100, 0.02, 0.25, 0.5),
    (500, 0.05, 0.25, 0.5),
    (500, 0.02, 0.25, 0.5),  # the default
    (500, 0.02, 0.25, 0.2),
    (1000, 0.02, 0.25, 0.5),
)


@dataclass(frozen=True)
class Problem:
    """A space with a predictor and a cost, and what random subnets say of them."""

    cost: PopulationCost
    accuracy: Callable[[np.ndarray], np.ndarray]
    budgets: tuple[float, ...]
    deviation: float  # of the predictions of random subnets


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--spaces", nargs="+", choices=tuple(SPACES), default=list(SPACES), help="spaces to search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="seeds of each search, at least two")
    parser.add_argument("--candidates", type=int, default=50_000, help="candidates of each search")
    parser.add_argument(
        "--settings",
        nargs="+",
        type=setting,
        default=SETTINGS,
        help="population,mutation_prob,parent_ratio,mutation_ratio (default: those of docs/measurements.md)",
    )
    parser.add_argument("--log", type=Path, help="file to which each search appends a line")
    return parser


def setting(text: str) -> Setting:
    """The `type` of --settings."""
    population, *rest = text.split(",")
    mutation_prob, parent_ratio, mutation_ratio = map(float, rest)
    return int(population), mutation_prob, parent_ratio, mutation_ratio


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if len(args.seeds) < 2:
        raise UserError("a spread needs at least two --seeds")
    known = read_jsonl(args.log) if args.log else []
    found: list[Record] = []
    for name in tqdm(args.spaces, desc="spaces", disable=None):
        problem = problem_of(name)
        for chosen in tqdm(args.settings, desc=name, disable=None, leave=False):
            for quantile, budget in zip(QUANTILES, problem.budgets, strict=True):
                for seed in args.seeds:
                    asked = {"space": name, "quantile": quantile, "setting": list(chosen), "seed": seed}
                    asked |= {"candidates": args.candidates, "budget": budget, "deviation": problem.deviation}
                    record = next((one for one in known if asked.items() <= one.items()), None)
                    if record is None:
                        record = {**asked, "accuracy": best_accuracy(problem, chosen, budget, args.candidates, seed)}
                        if args.log:
                            append_jsonl(args.log, record)
                    found.append(record)
    print(markdown(("population", "generations", "mutation", "parents", "mutants", *SHORTFALL), shortfalls(found)))
    print()
    print(markdown(("space", "budget", *map(title_of, settings_of(found))), accuracies(found)))


def problem_of(name: str) -> Problem:
    """The space of this name with its shipped predictor, or with one of random weights."""
    if (hidden := SPACES.get(name)) is None:
        predictor = load_predictor(ModelFolder(Path("models") / name).acc_quant)
    else:
        torch.manual_seed(0)
        predictor = AccuracyPredictor(get_space(name), hidden)
    space, accuracy = predictor.space, predictor.fast()
    cost = PopulationCost(space, "latency", BitFusion(), space.budget_scope)
    genes = sample(space, N_RANDOM, np.random.default_rng(0))
    budgets = tuple(np.quantile(cost.predict(genes), QUANTILES).tolist())
    return Problem(cost=cost, accuracy=accuracy, budgets=budgets, deviation=float(np.std(accuracy(genes))))


def best_accuracy(problem: Problem, chosen: Setting, budget: float, candidates: int, seed: int) -> float:
    """The best predicted accuracy that one search finds."""
    population, mutation_prob, parent_ratio, mutation_ratio = chosen
    config = EvolutionConfig(
        population=population,
        generations=candidates // population - 1,  # the first population counts as one
        mutation_prob=mutation_prob,
        parent_ratio=parent_ratio,
        mutation_ratio=mutation_ratio,
        seed=seed,
    )
    cost = problem.cost
    finder = EvolutionFinder(
        cost.space, problem.accuracy, cost.predict, budget, config, cost.cheapest_genes(), cost.unit
    )
    return finder.run().accuracy


Cell = tuple[str, float, float]  # space, quantile, budget
SHORTFALL = ("short, mean", "short, worst cell", "spread over seeds")


def cells_of(found: Sequence[Record]) -> list[Cell]:
    """The cells in order."""
    return list(dict.fromkeys((one["space"], one["quantile"], one["budget"]) for one in found))


def title_of(chosen: Sequence[float]) -> str:
    """The title of a setting's column."""
    return ", ".join(map(str, chosen))


def of_cell(found: Sequence[Record], cell: Cell, chosen: list[float] | None = None) -> list[Record]:
    """The searches of a cell, with one setting or with all."""
    space, quantile, _ = cell
    inside = [one for one in found if (one["space"], one["quantile"]) == (space, quantile)]
    return inside if chosen is None else [one for one in inside if one["setting"] == chosen]


def settings_of(found: Sequence[Record]) -> list[list[float]]:
    """The settings in order."""
    return [list(one) for one in dict.fromkeys(tuple(one["setting"]) for one in found)]


def shortfalls(found: Sequence[Record]) -> list[tuple[str, ...]]:
    """Rows of the first table, the best setting first."""
    rows = []
    for chosen in settings_of(found):
        means, spreads = [], []
        for cell in cells_of(found):
            inside = of_cell(found, cell)
            best, unit = max(one["accuracy"] for one in inside), inside[0]["deviation"]
            short = [(best - one["accuracy"]) / unit for one in of_cell(inside, cell, chosen)]
            means.append(fmean(short))
            spreads.append(stdev(short))
        population, mutation, parents, mutants = chosen
        generations = found[0]["candidates"] // int(population)
        numbers = (fmean(means), max(means), fmean(spreads))
        rows.append((fmean(means), (population, generations, mutation, parents, mutants), numbers))
    return [(*map(str, of), *(f"{number:.3f}" for number in numbers)) for _, of, numbers in sorted(rows)]


def accuracies(found: Sequence[Record]) -> list[tuple[str, ...]]:
    """Rows of the second table: predicted accuracies (x 100) of every cell, mean and spread over seeds."""
    rows = []
    for cell in cells_of(found):
        of = [[100 * one["accuracy"] for one in of_cell(found, cell, chosen)] for chosen in settings_of(found)]
        space, quantile, budget = cell
        numbers = (f"{fmean(some):.2f} ({stdev(some):.2f})" for some in of)
        rows.append((space, f"{quantile:.0%}, {budget:.4g} ms", *numbers))
    return rows


if __name__ == "__main__":
    run(main)
