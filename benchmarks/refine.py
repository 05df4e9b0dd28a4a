"""Does it pay to spend a part of the measurements on what the search finds, instead of on random pairs?

Both searches have a predictor of the same kind and the same number of measured subnets. The one-shot search has random
pairs alone. The refined one has fewer random pairs, and measures the rest itself, in rounds (search.py --mode nsga2
--refine). Each seed draws its own part of the shipped pairs and its own search. Of both fronts the most accurate points
within five budgets are measured: on the validation images, as pairs are, which says how far predictions are off, and on
the test images, which no search has seen. Budgets are spaced evenly in the logarithm, from the cheapest to the most
accurate point of the first one-shot front; the first is a little above that end.

Every result is a line of --out, so a killed run continues.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy.stats import ttest_rel
from tqdm import tqdm

from apq.cli import Parser, run
from apq.errors import UserError
from apq.files import append_jsonl, read_jsonl
from apq.genes import subnets_of
from apq.resume import NOT_KEPT
from benchmarks.markdown import markdown
from dataset.pairs import PairStore
from elastic_nn.training.session import ONE_PROCESS
from lut.bitfusion import BitFusion
from lut.costs import UNITS
from lut.population import PopulationCost
from methods.nsga2.config import Nsga2Config
from methods.nsga2.front_finder import Front
from methods.nsga2.front_search import FrontTask
from methods.nsga2.picking import Bound, pick
from methods.nsga2.refining import front_of, search_of
from methods.search.archive import Archive, accuracies_of
from methods.search.measurement import Measurement
from methods.search.predicted import load_quantized_predictor
from methods.search.refine import Refining, refine
from methods.search.refine_task import load_refining
from methods.search.surrogate import Surrogate

METHODS = ("one-shot", "refined")
ABOVE_CHEAPEST = 1.05


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the runs on one supernet share."""

    task: FrontTask
    refining: Refining
    n_random: int
    n_measured: int

    @property
    def on_test(self) -> Measurement:
        """A measurement on the test images."""
        measurement = self.refining.measurement
        return replace(measurement, splits=replace(measurement.splits, val=measurement.splits.test))


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/fashion"), help="folder of supernet and predictor")
    parser.add_argument("--cost", choices=tuple(UNITS), default="latency", help="the quantity that the budgets limit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds to run")
    parser.add_argument("--random", type=int, default=120, help="random pairs of the refined search")
    parser.add_argument("--measured", type=int, default=40, help="subnets that it measures; the other has more pairs")
    parser.add_argument("--rounds", type=int, default=4, help="rounds in which it measures them")
    parser.add_argument("--n_budgets", type=int, default=5, help="budgets at which the fronts are compared")
    parser.add_argument("--generations", type=int, default=200, help="of each NSGA-II, of 500 candidates")
    parser.add_argument("--out", type=Path, default=Path("exps/refine.jsonl"), help="file of finished runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    setting = load_setting(args)
    key = {"models": str(args.models), "cost": args.cost, "random": args.random, "measured": args.measured}
    key |= {"n_rounds": args.rounds, "generations": args.generations, "n_budgets": args.n_budgets}
    runs = [one for one in read_jsonl(args.out) if all(one.get(name) == value for name, value in key.items())]
    done = {(one["method"], one["seed"]): one for one in runs}
    wanted = [(method, seed) for seed in args.seeds for method in METHODS]
    budgets = next((np.array(one["budgets"]) for one in runs), None)
    for method, seed in tqdm([one for one in wanted if one not in done], disable=None):
        front, facts = (one_shot if method == "one-shot" else refined)(setting, seed)
        if budgets is None:
            low, high = np.log(front.values[[0, -1], 1])
            budgets = np.exp(np.linspace(low + np.log(ABOVE_CHEAPEST), high, args.n_budgets))
        record = {**key, "method": method, "seed": seed, "budgets": budgets.tolist(), **facts}
        done[method, seed] = {**record, **measured_at(setting, front, budgets)}
        append_jsonl(args.out, done[method, seed])
    print_tables(args, budgets, done)


def load_setting(args: Any) -> Setting:
    """The supernet, images and pairs of the folder, without what other searches have measured."""
    predictor = load_quantized_predictor(args.models)
    flags = SimpleNamespace(acc_predictor_dir=args.models, device="cpu", recipe=None, data=None, refine=args.rounds)
    refining = load_refining(flags, predictor, ONE_PROCESS, args.measured)
    space = predictor.space
    task = FrontTask(
        predictor=predictor,
        models=args.models,
        cost_model=BitFusion(),
        scope=space.budget_scope,
        costs={args.cost: PopulationCost(space, args.cost, BitFusion(), space.budget_scope)},
        bounds=(),
        config=Nsga2Config(generations=args.generations),
        risk=None,
        device="cpu",
    )
    return Setting(task=task, refining=refining, n_random=args.random, n_measured=args.measured)


def part_of(setting: Setting, seed: int, n: int) -> Surrogate:
    """The predictor to train on `n` random pairs of a seed. The first ones are the same for every `n`."""
    surrogate = setting.refining.surrogate
    rows = np.random.default_rng(seed).permutation(len(surrogate.genes))[:n]
    if len(rows) < n:
        raise UserError(f"there are {len(rows)} pairs, not {n}")
    config = replace(surrogate.config, seed=seed)
    return replace(surrogate, genes=surrogate.genes[rows], accuracies=surrogate.accuracies[rows], config=config)


def one_shot(setting: Setting, seed: int) -> tuple[Front, dict[str, Any]]:
    """The front of a search with a predictor of random pairs."""
    predictor = part_of(setting, seed, setting.n_random + setting.n_measured).trained_on_all()
    return setting.task.find(predictor, replace(setting.task.config, seed=seed), NOT_KEPT), {}


def refined(setting: Setting, seed: int) -> tuple[Front, dict[str, Any]]:
    """The front of a search that measures, as predicted before, and how far each round's predictions were off."""
    task = replace(setting.task, config=replace(setting.task.config, seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        store = PairStore(Path(folder) / "measured")
        archive = Archive(store=store, space=task.space, made_by=setting.refining.archive.made_by)
        surrogate = part_of(setting, seed, setting.n_random)
        refining = replace(setting.refining, archive=archive, surrogate=surrogate)
        found = refine(refining, search_of(task))
        front = front_of(task, refining, found)
        keys = ("genes", "predicted")
        genes, predicted = (np.concatenate([getattr(one, key) for one in found.rounds]) for key in keys)
        before = accuracies_of(front.genes, genes, predicted)  # NaN where a point is a random pair
        values = np.column_stack([np.where(np.isnan(before), front.values[:, 0], before), front.values[:, 1:]])
        return replace(front, values=values), found.record()


def measured_at(setting: Setting, front: Front, budgets: np.ndarray) -> dict[str, list[float | None]]:
    """The points of a front at the budgets: predicted, on the validation and on the test images; their costs.

    None where no point is within a budget.
    """
    (name,) = setting.task.costs
    ranked = front.values[:, 0] if np.isnan(front.measured).any() else front.measured
    found: list[dict[str, float | None]] = []
    for limit in budgets:
        if not (front.values[:, 1] <= limit).any():
            found.append(dict.fromkeys(("predicted", "costs", "validation", "test")))
            continue
        row = pick((Bound(name, float(limit)),), ranked, {name: front.values[:, 1]})
        (subnet,) = subnets_of(setting.task.space, front.genes[[row]])
        predicted, cost = front.values[row].tolist()
        tops = {"validation": setting.refining.measurement.top1(subnet), "test": setting.on_test.top1(subnet)}
        found.append({"predicted": predicted, "costs": cost, **tops})
    return {key: [one[key] for one in found] for key in found[0]}


def print_tables(args: Any, budgets: np.ndarray, done: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Print, for each budget, how far predictions are off, and the test accuracies with a paired t test."""

    def of(method: str, key: str) -> np.ndarray:  # (seeds, budgets) points, NaN where there is no result
        return 100 * np.array([done[method, seed][key] for seed in args.seeds], dtype=float)

    gaps = [of(method, "predicted") - of(method, "validation") for method in METHODS]
    tests = [of(method, "test") for method in METHODS]
    both = ~np.isnan(tests[0] + tests[1])  # (seeds, budgets)
    rows = []
    for title, columns in [
        *((f"<= {budget:.4g}", [i]) for i, budget in enumerate(budgets)),
        ("all", [*range(len(budgets))]),
    ]:
        seeds = both[:, columns].all(1)
        gap, test = ([values[np.ix_(seeds, columns)] for values in of_methods] for of_methods in (gaps, tests))
        first, second = (values.mean(1) for values in test)
        p = f"{ttest_rel(second, first).pvalue:.3f}" if seeds.sum() > 1 else ""
        off = (shown(values.mean(1)) for values in gap)
        distances = (shown(np.abs(values).mean(1)) for values in gap)
        rows.append((title, str(seeds.sum()), *off, *distances, shown(first), shown(second), shown(second - first), p))
    n = args.random + args.measured
    print(f"{args.models}, {args.cost}, {n} measured subnets each; points of top-1:\n")
    kinds = [f"{what}, {method}" for what in ("off", "distance", "test") for method in METHODS]
    print(markdown(("budget", "seeds", *kinds, "gain", "p"), rows))
    steps = np.array(
        [[one["mean_difference"] for one in done["refined", s]["rounds"]] for s in args.seeds], dtype=float
    )
    offs = ", ".join(f"{100 * off:+.2f}" for off in np.nanmean(steps, axis=0))
    print(f"\nPredictions of candidates before they were measured, round by round: {offs} points off")


def shown(values: np.ndarray) -> str:
    """Mean and standard deviation of (seeds,) values."""
    if not len(values):
        return ""
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" if len(values) > 1 else f"{values.mean():.2f}"


if __name__ == "__main__":
    run(main)
