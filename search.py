"""Search architecture, channel pruning and bit-widths together under one budget; or prepare what the search needs.

  search.py --constraint 0.05 --type latency --exp_name NAME     search; writes exps/NAME. Next: quant_aware.py
  search.py --prepare acc                                        gather float pairs, train the accuracy predictor
  search.py --prepare acc_quant --acc_train_sample N             gather N quantized pairs, train the quantized one
  search.py --mode ddpg --model NAME --quantizer linear          choose the bits of each layer of a trained network
  search.py --mode sequential --constraint 0.05                  architecture, then pruning, then bits: the baseline
  search.py --mode coarse_to_fine                                measure subnets as they are: for supernets that need
                                                                 no finetune. Next: test.py
  search.py --mode nsga2 --objectives accuracy,latency           the front for all budgets at once; then, without a
  search.py --mode nsga2 --pick 'latency<=0.03'                  search, its best point for one. Next: test.py, or for
                                                                 a float supernet quant_aware.py

What was killed continues with the same command. Preparing appends to dataset/NetInfo/SPACE; torchrun shares it among
processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import methods.coarse_to_fine.command as coarse_to_fine
import methods.ddpg.command as ddpg
import methods.ddpg.flags as ddpg_flags
import methods.evolution.command as evolution
import methods.nsga2.command as nsga2
import methods.sequential.command as sequential
from apq.checkpoint import digest
from apq.cli import Parser, add_common_flags, run
from apq.device import resolve_device
from apq.errors import UserError
from apq.files import check_writable
from apq.model_folder import DEFAULT_MODELS, ModelFolder
from apq.resume import Resume
from apq.space import space_to_dict
from dataset import check_classes, load_splits
from dataset.imagenet import tell_unreadable
from dataset.pairs import NETINFO, PairStore
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet
from elastic_nn.quantizers import FLOAT, LINEAR
from elastic_nn.training.distributed import check_agreement, processes, wait
from elastic_nn.training.pairs import gather_as_is, gather_finetuned
from elastic_nn.training.recipes import RECIPES, get_recipe
from elastic_nn.training.session import Execution, Session
from lut.costs import add_cost_flags
from methods.nsga2.front_finder import Nsga2Config
from utils.latency_predictor import UNITS
from utils.predictor_files import load_predictor, save_predictor
from utils.predictor_training import (
    FEWEST_PAIRS,
    SAVE_SECONDS,
    PredictorConfig,
    train_predictor,
    training_record,
)

MODES = {
    "evolution": evolution.run,
    "ddpg": ddpg.run,
    "sequential": sequential.run,
    "coarse_to_fine": coarse_to_fine.run,
    "nsga2": nsga2.run,
}
OF_ANY = {"help", "mode", "type", "config", "table", "exp_name", "exp_dir", "overwrite", "seed", "device", "json"}


def build_parser() -> tuple[Parser, dict[str, set[str]]]:
    """The parser, and which flags belong to each mode and to "prepare"."""
    parser = Parser(__doc__)
    parser.add_argument("--mode", choices=tuple(MODES), default="evolution", help="how to search")
    parser.add_argument("--constraint", type=float, help="budget, in the unit of --type")
    units = ", ".join(f"{name}: {unit}" for name, unit in UNITS.items())
    parser.add_argument(
        "--type",
        choices=tuple(UNITS),
        help=f"what the budget limits ({units}; default: latency, of k-means size, of coarse_to_fine flops)",
    )
    add_cost_flags(parser, "the published BitFusion")
    parser.add_argument(
        "--acc_predictor_dir", type=Path, default=DEFAULT_MODELS, help="folder of predictors and supernet"
    )
    parser.add_argument("--exp_name", default="test", help="name of the experiment: its folder is exps/NAME")
    parser.add_argument("--exp_dir", type=Path, help="folder of the experiment (default: exps/EXP_NAME)")
    parser.add_argument("--overwrite", action="store_true", help="replace what exists: experiment or predictor")
    parser.add_argument("--data", type=Path, help="image folder (train/CLASS, val/CLASS); digits and glyphs need none")
    parser.add_argument("--recipe", help=f"training recipe: {', '.join(RECIPES)} (default: the network's own)")
    parser.add_argument("--prepare", choices=("acc", "acc_quant"), help="gather pairs and train a predictor instead")
    parser.add_argument("--acc_train_sample", type=int, help="pairs to gather (default: the recipe's)")
    parser.add_argument("--netinfo", type=Path, help="folder of the pairs (default: dataset/NetInfo/SPACE)")
    images, of_evolution = {"data", "recipe"}, evolution.add_flags(parser, asdict(Nsga2Config()))
    searched = {"constraint", "acc_predictor_dir", *of_evolution}
    bits = ddpg_flags.add_bit_flags(parser) | ddpg_flags.add_agent_flags(parser)
    flags = {
        "prepare": {"prepare", "acc_predictor_dir", "acc_train_sample", "netinfo", *images},
        "evolution": searched | {"scope"},
        "ddpg": {"constraint", *images, *bits, *ddpg_flags.add_flags(parser)},
        "sequential": {*searched, *images, *bits, *sequential.add_flags(parser)},
        "coarse_to_fine": {
            "constraint",
            "acc_predictor_dir",
            "scope",
            *images,
            *coarse_to_fine.add_flags(parser),
        },
        "nsga2": {"acc_predictor_dir", "scope", *evolution.SHARED_WITH_NSGA2, *nsga2.add_flags(parser)},
    }
    add_common_flags(parser)
    return parser, flags


def main(argv: list[str] | None = None) -> None:
    parser, flags = build_parser()
    args = parser.parse_args(argv)
    mode = "prepare" if args.prepare else args.mode
    for name, value in vars(args).items():
        if name not in OF_ANY | flags[mode] and value != parser.get_default(name):
            owners = " or ".join("--prepare" if m == "prepare" else f"--mode {m}" for m in flags if name in flags[m])
            raise UserError(f"--{name} belongs to {owners}")
    if args.type == "flops" and mode in ("ddpg", "sequential"):
        raise UserError(f"--type flops counts the same at any bits, which --mode {mode} chooses; use bitops")
    if args.prepare:
        prepare(args)
    else:
        MODES[args.mode](args)


def prepare(args: argparse.Namespace) -> None:
    """Gather pairs from the supernet, on all processes, and train the predictor that they are for, on one."""
    device = resolve_device(args.device)
    with processes(device) as execution:
        gathered = gather(args, device, execution)
    if execution.main:
        fit(args, device, *gathered)


def gather(
    args: argparse.Namespace, device: torch.device, execution: Execution
) -> tuple[PairStore, int, dict[str, Any], int]:
    """Measure the pairs that are missing, each process its part; returns their store, number and origin, and the width
    of the predictor that the recipe trains on them."""
    folder, quantized = ModelFolder(args.acc_predictor_dir), args.prepare == "acc_quant"
    target = folder.acc_quant if quantized else folder.acc
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists; give --overwrite to train it anew (pairs that are there are kept)")
    supernet, facts = (load_quantized_supernet if quantized else load_supernet)(folder.supernet)
    space, as_is = supernet.space, supernet.scheme != LINEAR  # linear quantizers were added to a float supernet
    if supernet.scheme != FLOAT and not quantized:
        raise UserError(f"{folder.supernet} was trained quantized: its pairs are gathered by --prepare acc_quant")
    recipe, splits = get_recipe(args.recipe or facts.recipe, space), load_splits(space, args.data)
    check_classes(splits, facts.images, folder.supernet)
    n_pairs = recipe.pairs_quant if quantized else recipe.pairs_float
    if args.acc_train_sample is not None:
        n_pairs = args.acc_train_sample
    if n_pairs < FEWEST_PAIRS:
        raise UserError(f"--acc_train_sample {n_pairs}: a predictor needs at least {FEWEST_PAIRS} pairs")
    if not as_is:  # before the pairs, which take hours
        load_predictor(folder.acc, space)
    store = PairStore((args.netinfo or NETINFO / space.name) / args.prepare, execution.rank)
    check_writable(folder.path)
    check_writable(store.path)
    made_by: dict[str, Any] = {
        "seed": args.seed,
        "recalibration_images": recipe.recalibration_images,
        "supernet": digest(supernet.state_dict()),
        "images": splits.source,
    }
    if not as_is:
        made_by["finetune"] = asdict(recipe.pair_finetune)
        if recipe.pair_epoch_images is not None:
            made_by["epoch_images"] = recipe.pair_epoch_images
    check_agreement({"space": space_to_dict(space), "pairs": n_pairs, **made_by}, execution)
    missing = store.open(space, made_by, n_pairs)
    check_agreement({"pairs (their folder must be shared)": missing}, execution)
    wait(execution)  # nobody adds pairs before all have seen which are missing
    started = time.perf_counter()
    session = Session(splits=splits, device=device, seed=args.seed, execution=execution)
    mine = missing[execution.rank :: execution.world_size]
    (gather_as_is if as_is else gather_finetuned)(supernet.to(device), session, recipe, store, mine)
    wait(execution)
    if execution.main:
        tell_unreadable(splits)
    if missing and execution.main:
        a_minute = 60 * len(missing) / (time.perf_counter() - started)
        pace = f"{a_minute:.1f} subnets a minute on {execution.world_size} process(es)"
        print(f"{len(missing)} pairs measured, {pace}", file=sys.stderr)
    return store, n_pairs, made_by, recipe.predictor_hidden


def fit(
    args: argparse.Namespace,
    device: torch.device,
    store: PairStore,
    n_pairs: int,
    made_by: dict[str, Any],
    hidden: int,
) -> None:
    """Train the predictor of gathered pairs, save it, print its scores.

    One of finetuned pairs, which are few, is transferred from the float predictor; others start from nothing.
    """
    folder, quantized = ModelFolder(args.acc_predictor_dir), args.prepare == "acc_quant"
    target = folder.acc_quant if quantized else folder.acc
    space = load_supernet(folder.supernet)[0].space
    genes, accuracies = store.load(space, n_pairs)
    config = PredictorConfig(seed=args.seed, hidden=hidden)
    how = {
        "quantize": quantized,
        "initial": load_predictor(folder.acc, space) if "finetune" in made_by else None,
        "config": config,
    }
    asked = training_record(genes, accuracies, **how)
    # A training takes seconds: the state of another one is dropped.
    state_file = folder.state_of(target)
    resume = Resume(state_file, asked, "predictor training", restart=True, every_s=SAVE_SECONDS)
    predictor, scores = train_predictor(genes, accuracies, space, **how, device=device, resume=resume)
    facts = {
        "data": {"pairs": str(store.path), "n_pairs": len(genes), **made_by},
        "scores": asdict(scores),
        "predictor_training": asdict(config),
    }
    save_predictor(target, predictor, facts)
    resume.done()
    if args.json:
        print(json.dumps({"predictor": str(target), **facts}))
        return
    print(f"{target}: trained on {scores.n_train} pairs of {store.path}, held out {scores.n_holdout}")
    print(f"held out: RMSE {scores.rmse:.4f}, Kendall tau {scores.kendall_tau:.3f}, Spearman {scores.spearman:.3f}")


if __name__ == "__main__":
    run(main)
