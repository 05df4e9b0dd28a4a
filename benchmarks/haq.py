"""Does HAQ's agent find better bits than simpler methods? On the small MobileNetV2 and glyphs.

Budgets are 60 % of the 8-bit latency (linear) and 10 % of the 32-bit size (k-means). For each seed three methods choose
a policy by validation top-1 after the short finetune of an episode, and one by the losses of single operands:

  agent        HAQ's agent
  random       as many random policies as the agent has episodes, their bits lowered to the budget in the same way
  uniform      all pairs of weight and activation bits that fit the budget, the same in every layer
  sensitivity  one policy, by measured sensitivities and integer programming (search.py --mode sensitivity)

The best policy of each method is finetuned and measured on the test images. Every result is a line of --out, so a
killed run continues. Runs with other --quantizers or --seeds may share the machine if each has its own --out.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from apq.cli import Parser, run
from apq.device import resolve_device
from apq.files import append_jsonl, read_jsonl
from apq.model_folder import ModelFolder
from apq.policy import QUANTIZERS, Policy, policy_from_strategy
from dataset import load_splits
from dataset.splits import make_loader
from elastic_nn.networks.model_file import load_model
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate, seed_epoch
from elastic_nn.training.finetune import finetune
from elastic_nn.training.policies import quantized_model
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from lut.bitfusion import BitFusion
from methods.search.bit_choices import FREE
from methods.search.bit_search import (
    Task,
    environment_of,
    make_scorer,
    make_task,
    policy_of_bits,
    search_bits,
)
from methods.search.settings import AgentConfig, BitSearch, PolicySearch
from methods.sensitivity.bits import search_by_sensitivity
from methods.sensitivity.config import SensitivitySearch

METHODS = ("agent", "random", "uniform", "sensitivity")


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="mobilenet_v2_small", help="a network of models/NAME")
    parser.add_argument(
        "--quantizers", nargs="+", choices=tuple(QUANTIZERS), default=["linear", "kmeans"], help="quantizers to run"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="methods to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--episodes", type=int, default=300, help="policies tried by the agent, and at random")
    parser.add_argument("--out", type=Path, default=Path("exps/haq.jsonl"), help="file of measured records")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    done = {(r["quantizer"], r["method"], r["seed"]): r for r in read_jsonl(args.out)}
    wanted = [(q, m, s) for q in args.quantizers for s in args.seeds for m in args.methods]
    for key in tqdm(wanted, disable=None):
        if key not in done:
            done[key] = measure(args, *key, device)
            append_jsonl(args.out, done[key])
    print_tables(args, done)


def measure(args: Any, quantizer: str, method: str, seed: int, device: torch.device) -> dict[str, Any]:
    """The policy of one method and seed: its top-1 in the search, its cost, its accuracy after the finetune."""
    task = fresh_task(args.model, quantizer)
    recipe = get_recipe(None, task.spec)
    session = Session(splits=load_splits(task.spec), device=device, seed=seed)
    known = QUANTIZERS[quantizer]
    config = BitSearch(
        quantizer=quantizer,
        quantity="latency" if known.priced else "size",
        ratio=known.ratio,
        min_bit=known.fewest,
        max_bit=8,
        keep_ends=not known.weights_only,
        train_images=recipe.episode_images,
        val_images=recipe.episode_val_images,
    )
    started = time.monotonic(), time.process_time()
    policy, original, scores, facts = searched(args, task, config, recipe, method, session)
    return {
        "quantizer": quantizer,
        "method": method,
        "seed": seed,
        "tried": len(scores),
        "score": max(scores),
        "original": original,
        "ratio": task.costs.ratio(policy.matrix()),
        "strategy": policy.strategy,
        "scores": [round(score, 4) for score in scores],
        "search_s": round(time.monotonic() - started[0], 1),
        "search_cpu_s": round(time.process_time() - started[1], 1),
        **facts,
        **finetuned(args.model, policy, recipe, seed, device),
    }


def searched(
    args: Any, task: Task, config: BitSearch, recipe: Recipe, method: str, session: Session
) -> tuple[Policy, float, list[float], dict[str, float]]:
    """The policy of a method, top-1 of the float network and of each policy that was tried, and further facts."""
    if method == "sensitivity":
        chosen = search_by_sensitivity(task, SensitivitySearch(bits=config, train=recipe.episode), session)
        found = chosen.found
        return found.policy, found.original, [found.episode["accuracy"]], chosen.record()
    if method == "uniform":
        scorer = make_scorer(task, config, recipe.episode, session)
        policies = [policy_of_bits(task.layers, config.quantizer, bits) for bits in uniform_candidates(task, config)]
        scores = [scorer.accuracy(policy).top1 for policy in policies]
        return policies[int(np.argmax(scores))], scorer.original.top1, scores, {}
    warmup = args.episodes if method == "random" else AgentConfig().warmup
    agent = AgentConfig(episodes=args.episodes, warmup=warmup, seed=session.seed)
    found = search_bits(task, PolicySearch(bits=config, agent=agent, train=recipe.episode), session)
    return found.policy, found.original, [record["accuracy"] for record in found.history], {}


def fresh_task(model: str, quantizer: str) -> Task:
    """The trained float network, its layers and costs."""
    net, spec, _ = load_model(ModelFolder(Path("models") / model).model, model)
    quantity = "latency" if QUANTIZERS[quantizer].priced else "size"
    return make_task(net, spec, quantizer, quantity, BitFusion())


def uniform_candidates(task: Task, config: BitSearch) -> list[np.ndarray]:
    """All policies within the budget that give every free layer the same bits."""
    environment, found = environment_of(task, config), []
    numbers = np.arange(config.min_bit, config.max_bit + 1)
    for pair in np.stack(np.meshgrid(numbers, numbers), axis=-1).reshape(-1, 2):
        bits = np.where(environment.fixed == FREE, pair[: environment.fixed.shape[1]], environment.fixed)
        if environment.costs.total(bits) <= environment.budget and not any((bits == other).all() for other in found):
            found.append(bits)
    return found


def finetuned(model: str, policy: Policy, recipe: Recipe, seed: int, device: torch.device) -> dict[str, Any]:
    """Validation and test top-1 after the recipe's finetune, at the epoch with the best validation top-1."""
    task = fresh_task(model, policy.quantizer)
    net, side, splits = task.net, task.spec.resolution, load_splits(task.spec)
    policy = policy_from_strategy(policy.quantizer, task.layers, policy.strategy)
    seed_epoch(seed, 0)
    quantized_model(net, policy, splits, side, recipe.recalibration_images, device)
    val, weights = finetune(net, Session(splits=splits, device=device, seed=seed), recipe.finetune, side=side)
    net.load_state_dict(weights)
    test = evaluate(net, make_loader(splits.test, EVALUATION_BATCH, sides=(side,)), device)
    return {"val_top1": val, "test_top1": test.top1, "finetune": asdict(recipe.finetune)}


def print_tables(args: Any, done: dict[tuple[str, str, int], dict[str, Any]]) -> None:
    """Print a table for each quantizer."""
    for quantizer in args.quantizers:
        print(f"\n### {quantizer}, {QUANTIZERS[quantizer].ratio:.0%} budget, {args.model}\n")
        print("| seed | method | policies tried | cost ratio | top-1 in the search | val top-1 | test top-1 |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for seed in args.seeds:
            for method in args.methods:
                r = done[quantizer, method, seed]
                figures = " | ".join(f"{100 * r[key]:.2f}" for key in ("score", "val_top1", "test_top1"))
                print(f"| {seed} | {method} | {r['tried']} | {r['ratio']:.4f} | {figures} |")
        for method in args.methods:
            tests = [100 * done[quantizer, method, seed]["test_top1"] for seed in args.seeds]
            print(f"| mean | {method} | | | | | {np.mean(tests):.2f} |")


if __name__ == "__main__":
    run(main)
