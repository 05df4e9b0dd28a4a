"""Which probability of crossover gives NSGA-II the better front, at equal numbers of candidates?

Every probability searches the front of predicted accuracy and a cost with every seed; all other settings are those of
the preset "default", which are the published ones. The table has the hypervolume of each front, as a share of the area
from accuracy 0 to 1 and from no cost to the largest one on any front, and the predicted accuracy at five budgets. These
are spaced evenly in the logarithm over the first front.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from apq.cli import Parser, run
from apq.model_folder import ModelFolder
from benchmarks.fronts import front_of, hypervolume, points_of
from benchmarks.markdown import markdown
from lut.bitfusion import BitFusion
from lut.costs import UNITS
from lut.population import PopulationCost
from methods.nsga2.config import NSGA2S
from utils.predictor_files import load_predictor

N_BUDGETS = 5


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/qfa-mbv3-glyphs"), help="folder of the predictor")
    parser.add_argument("--cost", choices=tuple(UNITS), default="latency", help="the cost beside accuracy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each search")
    default = [preset.crossover_prob for preset in NSGA2S.values()]
    parser.add_argument("--crossover_probs", type=float, nargs="+", default=default, help="probabilities to compare")
    parser.add_argument("--generations", type=int, default=NSGA2S["default"].generations, help="generations to run")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    predictor = load_predictor(ModelFolder(args.models).acc_quant)
    space, accuracy = predictor.space, predictor.fast()
    cost = PopulationCost(space, args.cost, BitFusion(), space.budget_scope)
    asked = [(probability, seed) for probability in args.crossover_probs for seed in args.seeds]
    fronts = {}
    for probability, seed in tqdm(asked, disable=None):
        config = replace(NSGA2S["default"], crossover_prob=probability, seed=seed, generations=args.generations)
        fronts[probability, seed] = front_of(accuracy, cost, config)
    values = [front.values for front, _ in fronts.values()]
    largest = max(of[:, 1].max() for of in values)
    budgets = np.exp(np.linspace(*np.log(values[0][[0, -1], 1]), N_BUDGETS + 1))[1:]
    rows = []
    for (probability, seed), (front, seconds) in fronts.items():
        volume = hypervolume(front.values[:, 1], front.values[:, 0], largest)
        points = points_of(front, budgets, seconds)
        top1 = (f"{100 * value:.2f}" for value in points.accuracies)
        rows.append((probability, seed, f"{volume:.5f}", *top1, f"{points.evaluated:,}"))
    titles = [f"<= {budget:.4g}" for budget in budgets]
    print(f"Hypervolume, and predicted top-1 (%) of {space.name} at each budget of {args.cost} ({cost.unit}):\n")
    print(markdown(("crossover", "seed", "hypervolume", *titles, "evaluated"), rows))


if __name__ == "__main__":
    run(main)
