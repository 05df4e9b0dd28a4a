"""Which probability of crossover gives NSGA-II the better front, at equal numbers of candidates?

Every probability searches the front of predicted accuracy and latency in every space with every seed; all other
settings are those of the preset "default", which are the published ones. The predictors are those of
benchmarks/search_defaults.py, shipped or of fixed random weights. A table has the hypervolume of each front, as a share
of the area from accuracy 0 to 1 and from no cost to the largest one on any front, and the predicted accuracy at five
budgets. These are spaced evenly in the logarithm over the first front.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from apq.cli import Parser, run
from benchmarks.fronts import front_of, hypervolume, points_of
from benchmarks.markdown import markdown
from benchmarks.search_defaults import problem_of
from methods.nsga2.config import NSGA2S

SPACES = ("qfa-mbv3-glyphs", "glyphs", "qfa-mbv3")
N_BUDGETS = 5


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), help="spaces to search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each search")
    default = [preset.crossover_prob for preset in NSGA2S.values()]
    parser.add_argument("--crossover_probs", type=float, nargs="+", default=default, help="probabilities to compare")
    parser.add_argument("--generations", type=int, default=NSGA2S["default"].generations, help="generations to run")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    asked = [(probability, seed) for probability in args.crossover_probs for seed in args.seeds]
    for space in args.spaces:
        print(table_of(space, asked, args.generations))


def table_of(space: str, asked: Sequence[tuple[float, int]], generations: int) -> str:
    """The table of one space: a row for each probability and seed."""
    problem, fronts = problem_of(space), {}
    for probability, seed in tqdm(asked, desc=space, disable=None):
        config = replace(NSGA2S["default"], crossover_prob=probability, seed=seed, generations=generations)
        fronts[probability, seed], _ = front_of(problem.accuracy, problem.cost, config)
    values = [front.values for front in fronts.values()]
    largest = max(of[:, 1].max() for of in values)
    budgets = np.exp(np.linspace(*np.log(values[0][[0, -1], 1]), N_BUDGETS + 1))[1:]
    rows = []
    for (probability, seed), front in fronts.items():
        volume = hypervolume(front.values[:, 1], front.values[:, 0], largest)
        points = points_of(front, budgets, 0.0)
        top1 = (f"{100 * value:.2f}" for value in points.accuracies)
        rows.append((probability, seed, f"{volume:.5f}", *top1, f"{points.evaluated:,}"))
    titles = [f"<= {budget:.4g}" for budget in budgets]
    heading = f"\n{space}, latency in ms:\n\n"
    return heading + markdown(("crossover", "seed", "hypervolume", *titles, "evaluated"), rows)


if __name__ == "__main__":
    run(main)
