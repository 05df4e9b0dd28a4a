"""The work of `search.py --prepare`: gather the missing pairs, train the accuracy predictor."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from apq.checkpoint import digest
from apq.device import resolve_device
from apq.errors import UserError
from apq.files import SAVE_SECONDS, Record, check_writable
from apq.model_folder import ModelFolder
from apq.resume import Resume
from apq.space import space_to_dict
from dataset import check_classes, load_splits
from dataset.imagenet import report_unreadable
from dataset.pairs import NETINFO, PairStore
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet
from elastic_nn.training.distributed import check_agreement, joined, locked_by_first, wait
from elastic_nn.training.pairs import gather_as_is, gather_finetuned
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution, Session
from utils.predictor_files import load_predictor, save_predictor
from utils.predictor_training import (
    FEWEST_PAIRS,
    PredictorConfig,
    train_predictor,
    training_record,
)


def prepare(args: argparse.Namespace) -> None:
    """Gather pairs from the supernet in all processes, and train the predictor in the first.

    No other run can write the folder of the predictor meanwhile, or that of the pairs; UserError names the process of
    one that does.
    """
    device, folder = resolve_device(args.device), ModelFolder(args.acc_predictor_dir)
    with joined(device) as execution, locked_by_first(folder.locked(), execution) as finished:
        if not finished:
            gathered = gather(args, device, execution)
        if not execution.main:
            return
        if finished:
            say_finished(args)
        else:
            fit(args, device, *gathered)


def target_of(args: argparse.Namespace) -> Path:
    """The file of the predictor to train."""
    folder = ModelFolder(args.acc_predictor_dir)
    return folder.acc_quant if args.prepare == "acc_quant" else folder.acc


def say_finished(args: argparse.Namespace) -> None:
    """Print that the run that was killed had finished, and remove the state that it left."""
    target = target_of(args)
    ModelFolder(args.acc_predictor_dir).state_of(target).unlink(missing_ok=True)
    if args.json:
        print(json.dumps({"predictor": str(target), "finished": True}))
    else:
        print(f"{target} is finished: the run was killed after it was in place")


def gather(args: argparse.Namespace, device: torch.device, execution: Execution) -> tuple[PairStore, int, Record, int]:
    """Measure the missing pairs, each process its part.

    Returns the store of the pairs, their number and origin, and the width of the predictor to train on them. UserError
    where the predictor exists, or where the supernet, the images and the flags do not fit together.
    """
    folder, quantized, target = ModelFolder(args.acc_predictor_dir), args.prepare == "acc_quant", target_of(args)
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists; give --overwrite to train it anew (existing pairs are kept)")
    supernet, supernet_origin = (load_quantized_supernet if quantized else load_supernet)(folder.supernet)
    # Subnets are measured as they are, unless quantizers were added to a float supernet.
    space, as_is = supernet.space, supernet.scheme.trains_supernets
    if supernet.scheme.quantizes and not quantized:
        raise UserError(f"{folder.supernet} was trained quantized: gather its pairs with --prepare acc_quant")
    recipe, splits = get_recipe(args.recipe or supernet_origin.recipe, space), load_splits(space, args.data)
    check_classes(splits, supernet_origin.images, folder.supernet)
    n_pairs = number_of_pairs(args, recipe)
    if not as_is:  # checked before gathering, which takes hours
        load_predictor(folder.acc, space)
    store = PairStore((args.netinfo or NETINFO / space.name) / args.prepare, execution.rank)
    check_writable(folder.path)
    check_writable(store.path)
    weights = digest(supernet.state_dict())
    made_by = origin_of_pairs(args.seed, recipe, weights, splits.source, finetuned=not as_is)
    check_agreement({"space": space_to_dict(space), "pairs": n_pairs, **made_by}, execution)
    session = Session(splits=splits, device=device, seed=args.seed, execution=execution)
    with locked_by_first(store.locked(), execution):
        missing = store.open(space, made_by, n_pairs)
        measure(supernet.to(device), session, recipe, store, missing)
    return store, n_pairs, made_by, recipe.predictor_hidden


def measure(
    supernet: DynamicProxylessNASNets, session: Session, recipe: Recipe, store: PairStore, missing: Sequence[int]
) -> None:
    """Measure the missing pairs, each process its part, and append them to the store."""
    execution = session.execution
    check_agreement({"pairs (their folder must be shared)": missing}, execution)
    wait(execution)  # no process appends before all have read which are missing
    started = time.perf_counter()
    gather_pairs = gather_as_is if supernet.scheme.trains_supernets else gather_finetuned
    gather_pairs(supernet, session, recipe, store, missing[execution.rank :: execution.world_size])
    wait(execution)
    if execution.main:
        report_unreadable(session.splits)
    if missing and execution.main:
        a_minute = 60 * len(missing) / (time.perf_counter() - started)
        pace = f"{a_minute:.1f} subnets a minute on {execution.world_size} process(es)"
        print(f"{len(missing)} pairs measured, {pace}", file=sys.stderr)


def number_of_pairs(args: argparse.Namespace, recipe: Recipe) -> int:
    """The number of pairs to gather: that of the flag, or else of the recipe. UserError for too few."""
    n_pairs = recipe.pairs_quant if args.prepare == "acc_quant" else recipe.pairs_float
    if args.acc_train_sample is not None:
        n_pairs = args.acc_train_sample
    if n_pairs < FEWEST_PAIRS:
        raise UserError(f"--acc_train_sample {n_pairs}: a predictor needs at least {FEWEST_PAIRS} pairs")
    return n_pairs


def origin_of_pairs(seed: int, recipe: Recipe, weights: str, images: Record, *, finetuned: bool) -> Record:
    """All that the pairs depend on besides the space, as plain data. `weights` is the supernet's digest."""
    made_by: Record = {
        "seed": seed,
        "recalibration_images": recipe.recalibration_images,
        "supernet": weights,
        "images": images,
    }
    if finetuned:
        made_by["finetune"] = asdict(recipe.pair_finetune)
        if recipe.pair_epoch_images is not None:
            made_by["epoch_images"] = recipe.pair_epoch_images
    return made_by


def fit(
    args: argparse.Namespace,
    device: torch.device,
    store: PairStore,
    n_pairs: int,
    made_by: Record,
    hidden: int,
) -> None:
    """Train the predictor on the gathered pairs, save it, print its scores.

    For finetuned pairs, which are few, it is transferred from the float predictor. Others start from random weights.
    """
    folder, quantized, target = ModelFolder(args.acc_predictor_dir), args.prepare == "acc_quant", target_of(args)
    space = load_supernet(folder.supernet)[0].space
    genes, accuracies = store.load(space, n_pairs)
    config = PredictorConfig(seed=args.seed, hidden=hidden)
    how = {
        "quantize": quantized,
        "initial": load_predictor(folder.acc, space) if "finetune" in made_by else None,
        "config": config,
    }
    asked = training_record(genes, accuracies, **how)
    # Training takes seconds, so the state of another training is dropped.
    state_file = folder.state_of(target)
    resume = Resume(state_file, asked, "predictor training", restart=True, every_s=SAVE_SECONDS)
    predictor, scores = train_predictor(genes, accuracies, space, **how, device=device, resume=resume)
    facts = {
        "data": {"pairs": str(store.path), "n_pairs": len(genes), **made_by},
        "scores": asdict(scores),
        "predictor_training": asdict(config),
    }
    with folder.locked() as lock:
        lock.publishing(target)
        save_predictor(target, predictor, facts)
    resume.done()
    if args.json:
        print(json.dumps({"predictor": str(target), **facts}))
        return
    print(f"{target}: trained on {scores.n_train} pairs of {store.path}, held out {scores.n_holdout}")
    print(f"held out: RMSE {scores.rmse:.4f}, Kendall tau {scores.kendall_tau:.3f}, Spearman {scores.spearman:.3f}")
