"""Measure two claims of APQ on a space's own data, over several seeds, and print them as tables.

1. A quantized predictor that starts from the float one is better than one trained from scratch on the same quantized
   pairs. Measured as RMSE on held-out pairs; the seed draws the hold-out split and the training.
2. A searched subnet is better than the mean of random subnets of the same latency budget, when all are finetuned in the
   same way. Measured as test accuracy; the seed draws predictor, search, random subnets and finetunes. Random subnets
   cost 90 to 100 % of the budget.

Every finetune is a line of --out, so a killed run continues. Runs with other --seeds may share the machine if each has
its own --out.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from apq.checkpoint import digest
from apq.cli import Parser, run
from apq.device import resolve_device
from apq.errors import UserError
from apq.files import append_jsonl, read_jsonl
from apq.genes import sample, subnets_of
from apq.model_folder import ModelFolder
from apq.policy import LINEAR, of_activations
from apq.space import SearchSpace
from apq.subnet import Subnet, spec_of
from dataset import load_splits
from dataset.digits import VAL_VIEWS, distort
from dataset.pairs import NETINFO, PairStore
from dataset.splits import Splits, TensorImages, make_loader
from elastic_nn.networks.supernet_file import load_supernet, with_quantizers
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.engine import evaluate, seed_epoch
from elastic_nn.training.finetune import quantized_subnet, train_epochs
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from methods.evolution.evolution_finder import EVOLUTIONS, EvolutionFinder
from utils.accuracy_predictor import AccuracyPredictor
from utils.latency_predictor import LatencyPredictor
from utils.predictor_files import load_predictor
from utils.predictor_training import PredictorConfig, train_predictor

BAND = 0.9  # a random subnet costs at least this share of its budget
KINDS = ("searched", "random")
QUANTILES = (0.1, 0.3, 0.6)  # budgets, as quantiles of the latency of random subnets


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--acc_predictor_dir", type=Path, default=Path("models/digits"), help="folder of trained parts")
    parser.add_argument("--quantizer", choices=of_activations(), default=LINEAR, help="quantizers of the subnets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--random", type=int, default=50, help="random subnets for each budget and seed")
    parser.add_argument("--repeats", type=int, default=3, help="finetunes of each searched subnet, averaged")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each finetune")
    parser.add_argument("--out", type=Path, default=Path("exps/claims.jsonl"), help="file of measured records")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    folder, device = ModelFolder(args.acc_predictor_dir), resolve_device(args.device)
    source, origin = load_supernet(folder.supernet)
    supernet = with_quantizers(source, scheme_named(args.quantizer))
    space, splits, recipe = supernet.space, load_splits(supernet.space), get_recipe(origin.recipe, supernet.space)
    weights = digest(supernet.state_dict())
    supernet.to(device)
    float_predictor = load_predictor(folder.acc, space)
    genes, accuracies = PairStore(NETINFO / space.name / "acc_quant").load(space)
    cost = LatencyPredictor(type="latency", scope=space.budget_scope, space=space)
    latencies = cost.predict(sample(space, 20_000, np.random.default_rng(0)))
    budgets = [float(f"{b:.3g}") for b in np.quantile(latencies, QUANTILES)]
    recipe = replace(recipe, finetune=replace(recipe.finetune, epochs=args.epochs))

    print("| seed | held-out pairs | RMSE transferred | RMSE from scratch | Kendall transferred | from scratch |")
    print("| --- | --- | --- | --- | --- | --- |")
    plan: list[tuple[dict[str, object], Subnet, int]] = []
    for seed in args.seeds:
        settings = PredictorConfig(seed=seed)
        predictor, moved = train_predictor(
            genes, accuracies, space, quantize=True, initial=float_predictor, config=settings
        )
        _, fresh = train_predictor(genes, accuracies, space, quantize=True, config=settings)
        print(
            f"| {seed} | {moved.n_holdout} | {moved.rmse:.4f} | {fresh.rmse:.4f} "
            f"| {moved.kendall_tau:.3f} | {fresh.kendall_tau:.3f} |"
        )
        for budget in budgets:
            plan += plan_budget(space, predictor, cost, budget, seed, args.random, args.repeats)

    done = {record["key"]: record for record in read_jsonl(args.out)}
    test, hard = make_loader(splits.test, 400), make_loader(hard_test(splits), 400)
    records = []
    for facts, subnet, seed in tqdm(plan, desc="finetunes", disable=None):
        key = repr((facts, spec_of(space, subnet), asdict(recipe.finetune), weights, args.quantizer))
        if key not in done:
            net = finetuned(supernet, subnet, splits, recipe, seed, device)
            top1, hard_top1 = (evaluate(net, loader, device).top1 for loader in (test, hard))
            done[key] = {"key": key, **facts, "latency_ms": cost.predict_lat(subnet), "test": top1, "hard": hard_top1}
            append_jsonl(args.out, done[key])
        records.append(done[key])
    if records:
        report(records, args.seeds, budgets)


def plan_budget(
    space: SearchSpace,
    predictor: AccuracyPredictor,
    cost: LatencyPredictor,
    budget: float,
    seed: int,
    n_random: int,
    repeats: int,
) -> list[tuple[dict[str, object], Subnet, int]]:
    """The finetunes of one seed and budget: several of the searched subnet, one of each random subnet."""
    evolution = replace(EVOLUTIONS["published"], seed=seed)
    finder = EvolutionFinder(space, predictor.fast(), cost.predict, budget, evolution, cost.cheapest_genes(), cost.unit)
    found = finder.run().subnet
    pool = sample(space, 100_000, np.random.default_rng([seed, round(budget * 1e6)]))
    latencies = cost.predict(pool)
    same_budget = pool[(latencies <= budget) & (latencies >= BAND * budget)][:n_random]
    if len(same_budget) < n_random:
        raise UserError(f"only {len(same_budget)} random subnets cost {BAND:.0%} to 100 % of {budget} {cost.unit}")
    where = {"seed": seed, "budget": budget}
    return [
        *(({**where, "kind": "searched", "run": run}, found, 1000 * seed + run) for run in range(repeats)),
        *(
            ({**where, "kind": "random", "run": run}, subnet, 1000 * seed + run)
            for run, subnet in enumerate(subnets_of(space, same_budget))
        ),
    ]


def finetuned(
    supernet: torch.nn.Module, subnet: Subnet, splits: Splits, recipe: Recipe, seed: int, device: torch.device
) -> torch.nn.Module:
    """A subnet after its finetune. The last epoch counts: no epoch is chosen by accuracy."""
    seed_epoch(seed, 0)
    net = quantized_subnet(supernet, subnet, splits, recipe.recalibration_images, device)
    session = Session(splits=splits, device=device, seed=seed)
    train_epochs(net, session, recipe.finetune, side=subnet.resolution)
    return net


def hard_test(splits: Splits) -> TensorImages:
    """The test digits in fixed distorted views, like those of the validation digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        views = torch.cat([distort(splits.test.images) for _ in range(VAL_VIEWS)])
    return TensorImages(views, splits.test.labels.repeat(VAL_VIEWS))


def report(records: list[dict[str, object]], seeds: list[int], budgets: list[float]) -> None:
    """Print searched beside random subnets, one row for each seed and budget, on plain and distorted test digits."""
    print(
        "\n| seed | budget, ms | searched, ms | random, ms | searched | random, mean of n (sd) | searched, distorted |",
        end="",
    )
    print(" random, distorted (sd) |\n|" + " --- |" * 8)
    for seed in seeds:
        for budget in budgets:
            here = [r for r in records if r["seed"] == seed and r["budget"] == budget]
            by = {
                (kind, what): np.array([r[what] for r in here if r["kind"] == kind])
                for kind in KINDS
                for what in ("latency_ms", "test", "hard")
            }
            ms = [f"{of.mean():.5f}" if len(of) else "" for of in (by[kind, "latency_ms"] for kind in KINDS)]
            cells = []
            for what in ("test", "hard"):
                searched, chance = (by[kind, what] for kind in KINDS)
                n = f", n = {len(chance)}" if what == "test" else ""
                cells.append(f"{searched.mean():.2%}" if len(searched) else "")
                cells.append(f"{chance.mean():.2%} ({chance.std():.2%}{n})" if len(chance) else "")
            print(f"| {seed} | {budget:g} | " + " | ".join([*ms, *cells]) + " |")


if __name__ == "__main__":
    run(main)
