"""Is joint search better than architecture, then pruning, then bits, at equal latency budgets?

Both methods start from the same supernet. What they find has the same quantization-aware finetune, that of the recipe,
and its best validation epoch is measured on the test images. The sequential network is also finetuned in floating point
after pruning. In both methods bits lie between the fewest and the most of the space. The seed draws every search and
finetune. Every result is a line of --out, so a killed run continues; give runs of another --quantizer another --out.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
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
from apq.policy import QUANTIZER_HELP, of_activations
from benchmarks.final_finetune import finetuned
from dataset import load_splits
from dataset.splits import Splits
from elastic_nn.networks.supernet_file import load_supernet, with_quantizers
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.engine import seed_epoch
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.policies import quantized_model
from elastic_nn.training.recipe import Recipe, with_quantizer
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from lut.bitfusion import BitFusion
from lut.costs import network_costs
from lut.population import PopulationCost
from methods.evolution.evolution_finder import EVOLUTIONS, EvolutionFinder
from methods.search.settings import AgentConfig
from methods.sequential.config import SequentialConfig, Split
from methods.sequential.pipeline import Parts, run_sequential
from utils.predictor_files import load_predictor

COST_MODEL = BitFusion()
METHODS = ("joint", "sequential")
SCOPE = "full"  # the baseline prices every layer of a network
PRUNING_EPISODES, BITS_EPISODES, FLOAT_EPOCHS = 100, 150, 1


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--acc_predictor_dir", type=Path, default=Path("models/glyphs"), help="folder of trained parts")
    parser.add_argument("--quantizer", choices=of_activations(), help=QUANTIZER_HELP)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--constraints", type=float, nargs="+", default=[0.06], help="latency budgets, ms")
    parser.add_argument("--out", type=Path, default=Path("exps/sequential.jsonl"), help="file of measured records")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    done = {(r["constraint"], r["seed"], r["method"]): r for r in read_jsonl(args.out)}
    wanted = [(c, s, m) for c in args.constraints for s in args.seeds for m in METHODS]
    folder = ModelFolder(args.acc_predictor_dir)
    supernet, origin = load_supernet(folder.supernet)
    recipe = with_quantizer(get_recipe(origin.recipe, supernet.space), args.quantizer)
    splits = load_splits(supernet.space)
    for constraint, seed, method in tqdm(wanted, disable=None):
        if (constraint, seed, method) not in done:
            found = (joint if method == "joint" else sequential)(folder, splits, recipe, constraint, seed, device)
            record = {"constraint": constraint, "seed": seed, "method": method, **found}
            append_jsonl(args.out, record)
            done[constraint, seed, method] = record
    print_table(args, done)


def joint(
    folder: ModelFolder, splits: Splits, recipe: Recipe, constraint: float, seed: int, device: torch.device
) -> dict[str, Any]:
    """Search with APQ and finetune the subnet."""
    supernet = with_quantizers(load_supernet(folder.supernet)[0], scheme_named(recipe.quantizer))
    space = supernet.space
    cost = PopulationCost(space, "latency", COST_MODEL, SCOPE)
    accuracy = load_predictor(folder.acc_quant, space).fast()
    config = replace(EVOLUTIONS["published"], seed=seed)
    found = EvolutionFinder(space, accuracy, cost.predict, constraint, config, cost.cheapest_genes(), cost.unit).run()
    seed_epoch(seed, 0)
    net = quantized_subnet(supernet.to(device), found.subnet, splits, recipe.recalibration_images, device)
    latency = network_costs(space, found.subnet, COST_MODEL)[SCOPE].latency_ms
    return {"latency": latency, **finetuned(net, splits, recipe, found.subnet.resolution, seed, device)}


def sequential(
    folder: ModelFolder, splits: Splits, recipe: Recipe, constraint: float, seed: int, device: torch.device
) -> dict[str, Any]:
    """Run the three searches and finetune the network."""
    supernet, _ = load_supernet(folder.supernet)
    space = supernet.space
    choices = sorted({bits for kind in space.operands for bits in kind.choices})
    config = SequentialConfig(
        quantity="latency",
        split=Split(constraint=constraint),
        evolution=replace(EVOLUTIONS["published"], seed=seed),
        pruning_agent=AgentConfig(episodes=PRUNING_EPISODES, seed=seed),
        recalibration_images=256,
        finetune=replace(recipe.finetune, epochs=FLOAT_EPOCHS),
        bits_agent=AgentConfig(episodes=BITS_EPISODES, seed=seed),
        train_images=recipe.episode_images,
        val_images=recipe.episode_val_images,
        min_bit=choices[0],
        max_bit=choices[-1],
        quantizer=recipe.quantizer,
    )
    predictor = load_predictor(folder.acc, space)
    parts = Parts(supernet=supernet, predictor=predictor, recipe=recipe, cost_model=COST_MODEL)
    found = run_sequential(config, parts, Session(splits=splits, device=device, seed=seed))
    side = found.spec.resolution
    seed_epoch(seed, 0)
    quantized_model(found.net, found.bits.policy, splits, side, recipe.recalibration_images, device)
    facts = {"latency": found.bits.episode["cost"], "stages": [asdict(stage) for stage in found.stages]}
    return {**facts, **finetuned(found.net, splits, recipe, side, seed, device)}


def print_table(args: Any, done: dict[tuple[float, int, str], dict[str, Any]]) -> None:
    """Print one row for each budget, seed and method, with the costs after the baseline's stages in order."""
    print("| budget, ms | seed | method | latency, ms | after its stages, ms | val top-1 | test top-1 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for constraint in args.constraints:
        for seed in args.seeds:
            for method in METHODS:
                r = done[constraint, seed, method]
                stages = ", ".join(f"{stage['cost']:.4f}" for stage in r.get("stages", []))
                tops = f"{100 * r['val_top1']:.2f} | {100 * r['test_top1']:.2f}"
                print(f"| {constraint:g} | {seed} | {method} | {r['latency']:.4f} | {stages} | {tops} |")
        for method in METHODS:
            mean = np.mean([100 * done[constraint, seed, method]["test_top1"] for seed in args.seeds])
            print(f"| {constraint:g} | mean | {method} | | | | {mean:.2f} |")


if __name__ == "__main__":
    run(main)
