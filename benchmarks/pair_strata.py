"""Are points of a front predicted better if the predictor's pairs were drawn in strata?

--predictors are `acc_quant.pt` files of one supernet, from uniform and from stratified pairs. For each predictor and
seed NSGA-II finds a front. Its most accurate points within five budgets, the same for all, are measured as they are in
the supernet: on the validation images, as pairs are, and on the test images. "Off" is the distance of predicted and
validation top-1. Budgets are spaced evenly in the
logarithm, from the cheapest to the most accurate point of the first front.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from apq.cli import Parser, run
from apq.device import resolve_device
from apq.errors import UserError
from apq.genes import subnets_of
from apq.model_folder import ModelFolder
from benchmarks.fronts import Points, front_of, points_of
from benchmarks.markdown import markdown
from dataset import load_splits
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.training.pairs import subnet_top1
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from lut.bitfusion import BitFusion
from lut.costs import UNITS
from lut.population import PopulationCost
from methods.nsga2.front_finder import Nsga2Config
from utils.predictor_files import load_predictor


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/qfa-mbv3-glyphs"), help="folder of the supernet")
    parser.add_argument("--predictors", type=Path, nargs="+", required=True, help="files of quantized predictors")
    parser.add_argument("--cost", choices=tuple(UNITS), default="latency", help="the quantity that the budgets limit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the searches")
    parser.add_argument("--n_budgets", type=int, default=5, help="budgets")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    supernet, origin = load_supernet(ModelFolder(args.models).supernet)
    space, device = supernet.space, resolve_device("auto")
    cost = PopulationCost(space, args.cost, BitFusion(), space.budget_scope)
    budgets, found = np.zeros(0), []
    for file in args.predictors:
        predictor = load_predictor(file)
        if predictor.space != space:
            raise UserError(f"{file} is a predictor of space {predictor.space.name}, not of {space.name}")
        for seed in args.seeds:
            front, seconds = front_of(predictor.fast(), cost, Nsga2Config(seed=seed))
            if not len(budgets):
                low, high = np.log(front.values[[0, -1], 1])
                budgets = np.exp(np.linspace(low, high, args.n_budgets))
            found.append((file, seed, points_of(front, budgets, seconds)))
    session = Session(splits=load_splits(space), device=device)
    n_images = get_recipe(origin.recipe, space).recalibration_images
    splits = (session.splits.val, session.splits.test)

    def measured(points: Points) -> np.ndarray:  # (2, budgets): on validation and test images
        subnets = subnets_of(space, points.genes)
        net = supernet.to(device)
        return np.array(
            [[subnet_top1(net, subnet, session, split, n_images) for subnet in subnets] for split in splits]
        )

    rows = [rows_of(file, seed, points, measured(points)) for file, seed, points in tqdm(found, disable=None)]
    titles = [f"<= {budget:.4g}" for budget in budgets]
    print(f"Predicted / validation / test top-1 (%) at each budget of {args.cost} ({cost.unit}):\n")
    print(markdown(("predictor", "seed", *titles, "off, mean", "mean difference"), rows))


def rows_of(file: Path, seed: int, points: Points, measured: np.ndarray) -> tuple[str, ...]:
    """A row of the table: the figures at each budget, and how far predictions are from validation top-1."""
    cells = (" / ".join(f"{100 * value:.2f}" for value in of) for of in zip(points.accuracies, *measured, strict=True))
    off = 100 * (points.accuracies - measured[0])
    return str(file), str(seed), *cells, f"{np.abs(off).mean():.2f}", f"{off.mean():+.2f}"


if __name__ == "__main__":
    run(main)
