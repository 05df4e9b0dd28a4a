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
from benchmarks.bit_methods import METHODS, BitMethods
from benchmarks.final_finetune import finetuned
from dataset import load_splits
from elastic_nn.networks.model_file import load_model
from elastic_nn.training.engine import seed_epoch
from elastic_nn.training.policies import quantized_model
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from lut.bitfusion import BitFusion
from methods.search.bit_search import Task, make_task
from methods.search.settings import AgentConfig, BitSearch


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
    methods = BitMethods(bits=config, agent=AgentConfig(episodes=args.episodes, seed=seed), train=recipe.episode)
    chosen = methods.choose(method, task, session)
    policy, scores = chosen.policy, chosen.scores
    return {
        "quantizer": quantizer,
        "method": method,
        "seed": seed,
        "tried": len(scores),
        "score": max(scores),
        "original": chosen.original,
        "ratio": task.costs.ratio(policy.matrix()),
        "strategy": policy.strategy,
        "scores": [round(score, 4) for score in scores],
        "search_s": round(time.monotonic() - started[0], 1),
        "search_cpu_s": round(time.process_time() - started[1], 1),
        **chosen.facts,
        **tested(args.model, policy, recipe, seed, device),
    }


def fresh_task(model: str, quantizer: str) -> Task:
    """The trained float network, its layers and costs."""
    net, spec, _ = load_model(ModelFolder(Path("models") / model).model, model)
    quantity = "latency" if QUANTIZERS[quantizer].priced else "size"
    return make_task(net, spec, quantizer, quantity, BitFusion())


def tested(model: str, policy: Policy, recipe: Recipe, seed: int, device: torch.device) -> dict[str, Any]:
    """Validation and test top-1 after the recipe's finetune of the network at a policy."""
    task = fresh_task(model, policy.quantizer)
    net, side, splits = task.net, task.spec.resolution, load_splits(task.spec)
    policy = policy_from_strategy(policy.quantizer, task.layers, policy.strategy)
    seed_epoch(seed, 0)
    quantized_model(net, policy, splits, side, recipe.recalibration_images, device)
    return finetuned(net, splits, recipe, side, seed, device)


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
