"""Which accuracy predictor errs least on the same pairs? MLP, ensemble, own kernel regression, two of scikit-learn.

Each is trained on the shipped quantized pairs of a space but those that a seed holds out, and scored on these: RMSE in
points of top-1, Kendall tau, precision of the top tenth; for those that say how uncertain they are also the share of
pairs that are within two standard deviations. Pairs that were finetuned are few, so all predictors have the shipped
float predictor: the MLP starts from it (the ensemble from a float ensemble of the same float pairs), the others have
its prediction as a feature.

scikit-learn's have the MLP's one-hot features. Its Gaussian process has a linear and a squared-exponential kernel with
fitted sizes, length and noise; its boosted trees are 500 of depth 3, on half of the pairs each.

With --runs FILE every run is appended to it, and a killed benchmark continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from apq.model_folder import ModelFolder
from apq.presets import SPACES
from apq.space import SearchSpace
from benchmarks.markdown import markdown
from dataset.pairs import NETINFO, PairStore
from elastic_nn.training.recipes import get_recipe
from utils.accuracy_predictor import AccuracyPredictor
from utils.converter import Converter
from utils.kernel_predictor import train_kernel_predictor
from utils.predictor_files import load_predictor
from utils.predictor_scores import correlation, top_decile
from utils.predictor_training import PredictorConfig, holdout_split, member_width, train_predictor

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("digits", "fashion", "glyphs", "qfa-mbv3-glyphs")
HOLDOUT, MEMBERS = 0.2, 4
Scored = tuple[np.ndarray, np.ndarray | None]  # (n,) predictions of held-out pairs, and their standard deviations


@dataclass(frozen=True, kw_only=True)
class Task:
    """The pairs of a space, the float predictor that training starts from, and the same with several members."""

    space: SearchSpace
    genes: np.ndarray
    accuracies: np.ndarray
    hidden: int
    initial: AccuracyPredictor | None
    initials: AccuracyPredictor | None

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return holdout_split(len(self.genes), HOLDOUT, seed)

    def features(self) -> np.ndarray:
        """(n, k) one-hot features, and the float prediction in standard deviations."""
        one_hot = Converter(self.space).encode(self.genes).astype(np.float64)
        if self.initial is None:
            return one_hot
        top1 = self.initial.predict(self.genes).astype(np.float64)
        return np.column_stack([one_hot, (top1 - top1.mean()) / top1.std()])


def mlps(task: Task, seed: int, members: int) -> Scored:
    """The predictor that `search.py --prepare` trains."""
    config = PredictorConfig(seed=seed, hidden=member_width(task.hidden, members), members=members, holdout=HOLDOUT)
    initial = task.initials if members > 1 else task.initial
    predictor, _ = train_predictor(
        task.genes, task.accuracies, task.space, quantize=True, initial=initial, config=config
    )
    mean, spread = predictor.mean_and_spread(task.genes[task.split(seed)[1]])
    return mean, spread if members > 1 else None


def kernel(task: Task, seed: int) -> Scored:
    """The kernel regression of `utils.kernel_predictor`."""
    train, test = task.split(seed)
    pairs = task.genes[train], task.accuracies[train]
    predictor = train_kernel_predictor(*pairs, task.space, quantize=True, initial=task.initial, seed=seed)
    return predictor.mean_and_spread(task.genes[test])


def trees(task: Task, seed: int) -> Scored:
    """scikit-learn's gradient boosting."""
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        n_estimators=500, learning_rate=0.05, max_depth=3, subsample=0.5, random_state=seed
    )
    x, (train, test) = task.features(), task.split(seed)
    return model.fit(x[train], task.accuracies[train]).predict(x[test]), None


def process(task: Task, seed: int) -> Scored:
    """scikit-learn's Gaussian process."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

    shape = ConstantKernel(1.0) * RBF(5.0) + ConstantKernel(1.0) * DotProduct(1.0) + WhiteKernel(0.1)
    x, (train, test) = task.features(), task.split(seed)
    model = GaussianProcessRegressor(shape, normalize_y=True).fit(x[train], task.accuracies[train])
    return model.predict(x[test], return_std=True)


METHODS: dict[str, Callable[[Task, int], Scored]] = {
    "MLP": partial(mlps, members=1),
    f"{MEMBERS} MLPs": partial(mlps, members=MEMBERS),
    "scikit-learn, boosted trees": trees,
    "scikit-learn, Gaussian process": process,
    "own kernel": kernel,
}
SCORES = ("rmse", "tau", "top_tenth", "within_two", "seconds")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", choices=SHIPPED, default=SHIPPED, help="spaces whose pairs are used")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), help="predictors")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="of the splits and of training")
    parser.add_argument("--runs", type=Path, help="file of finished runs, one JSON line each")
    args = parser.parse_args(argv)
    lines = args.runs.read_text().splitlines() if args.runs and args.runs.exists() else []
    runs = {(run["space"], run["method"], run["seed"]): run for run in map(json.loads, lines)}
    for space in args.spaces:
        task = None
        wanted = [(space, method, seed) for method in args.methods for seed in args.seeds]
        for key in tqdm([key for key in wanted if key not in runs], space, disable=None):
            task = task or task_of(space)
            runs[key] = scored(task, *key)
            if args.runs:
                with args.runs.open("a") as file:
                    print(json.dumps(runs[key]), file=file)
        print(f"\n{space}\n")
        titles = ("predictor", "RMSE, points", "Kendall tau", "top tenth", "within 2 sd", "s a run")
        found = [[runs[space, method, seed] for seed in args.seeds] for method in args.methods]
        print(markdown(titles, [row_of(of_method) for of_method in found]))


def task_of(name: str) -> Task:
    """The shipped pairs of a space, and float predictors where its quantized one is transferred."""
    space = SPACES[name]
    genes, accuracies = PairStore(ROOT / NETINFO / name / "acc_quant").load(space)
    file, hidden = ModelFolder(ROOT / "models" / name).acc, get_recipe(None, space).predictor_hidden
    initial = initials = None
    if file.exists():
        initial = load_predictor(file, space)
        config = PredictorConfig(hidden=member_width(hidden, MEMBERS), members=MEMBERS)
        pairs = PairStore(ROOT / NETINFO / name / "acc").load(space)
        initials, _ = train_predictor(*pairs, space, quantize=False, config=config)
    return Task(space=space, genes=genes, accuracies=accuracies, hidden=hidden, initial=initial, initials=initials)


def scored(task: Task, space: str, method: str, seed: int) -> dict[str, object]:
    """A run: a predictor trained and scored on the pairs that the seed holds out."""
    started = time.perf_counter()
    predicted, std = METHODS[method](task, seed)
    seconds, measured = time.perf_counter() - started, task.accuracies[task.split(seed)[1]]
    errors = np.asarray(predicted, dtype=np.float64) - measured
    return {
        "space": space,
        "method": method,
        "seed": seed,
        "rmse": 100 * float(np.sqrt(np.mean(errors**2))),
        "tau": correlation("kendalltau", predicted, measured),
        "top_tenth": top_decile(predicted, measured),
        "within_two": None if std is None else float(np.mean(np.abs(errors) <= 2 * std)),
        "seconds": seconds,
    }


def row_of(runs: list[dict[str, object]]) -> tuple[str, ...]:
    """A row of the table: means and standard deviations over the seeds."""
    cells = []
    for name, digits in zip(SCORES, (2, 3, 2, 2, 1), strict=True):
        values = [run[name] for run in runs if run[name] is not None]
        std = np.std(values, ddof=1) if len(values) > 1 else 0.0
        cells.append(f"{np.mean(values):.{digits}f} ± {std:.{digits}f}" if values else "")
    return str(runs[0]["method"]), *cells


if __name__ == "__main__":
    main()
