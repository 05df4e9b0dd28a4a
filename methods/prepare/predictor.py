"""The work of `search.py --prepare`: gather the missing pairs, train the accuracy predictor."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

from apq.checkpoint import digest
from apq.cli import table
from apq.device import resolve_device
from apq.files import SAVE_SECONDS, Record
from apq.model_folder import ModelFolder
from apq.resume import Resume
from dataset.imagenet import report_unreadable
from elastic_nn.training.distributed import joined, locked_by_first
from elastic_nn.training.missing_pairs import gather_missing
from elastic_nn.training.pairs import gather_as_is, gather_finetuned
from elastic_nn.training.session import Execution, Session
from lut.costs import UNITS
from methods.prepare.outliers import outliers_among
from methods.prepare.plan import Preparation, check
from utils.predictor_bands import bands_of
from utils.predictor_files import save_predictor
from utils.predictor_scores import cautions, resolution
from utils.predictor_training import (
    PredictorConfig,
    holdout_split,
    kernel_settings,
    member_width,
    scored_kernel,
    train_predictor,
    training_record,
)


def prepare(args: argparse.Namespace) -> None:
    """Gather pairs from the supernet in all processes, and train the predictor in the first.

    No other run can write the folder of the predictor meanwhile, or that of the pairs; UserError names the process of
    one that does.
    """
    device, asked = resolve_device(args.device), Execution(deterministic=args.deterministic)
    folder = ModelFolder(args.acc_predictor_dir)
    with joined(device, asked) as execution, locked_by_first(folder.locked(), execution) as finished:
        if finished:
            if execution.main:
                say_finished(args, folder)
            return
        task = check(args, execution)
        members = max(1, task.members)
        hidden = member_width(task.recipe.predictor_hidden, members)
        config = PredictorConfig(seed=args.seed, hidden=hidden, members=members)
        made_by = gather(task, Session(splits=task.splits, device=device, seed=args.seed, execution=execution))
        if execution.main:
            fit(task, made_by, config, device, as_json=args.json)


def say_finished(args: argparse.Namespace, folder: ModelFolder) -> None:
    """Print that the run that was killed had finished, and remove the state that it left."""
    target = folder.predictor(args.prepare)
    folder.state_of(target).unlink(missing_ok=True)
    if args.json:
        print(json.dumps({"predictor": str(target), "finished": True}))
    else:
        print(f"{target} is finished: the run was killed after it was in place")


def gather(task: Preparation, session: Session) -> Record:
    """Measure the missing pairs, each process its part. Returns the origin of the pairs."""
    execution, supernet = session.execution, task.supernet
    weights = digest(supernet.state_dict())
    made_by = origin_of_pairs(task, session.seed, weights)
    measure = gather_as_is if task.as_is else gather_finetuned
    started = time.perf_counter()

    def measure_own(indices: Sequence[int], done: int) -> None:
        measure(supernet.to(session.device), session, task.recipe, task.store, indices, done)

    n_measured = gather_missing(task.store, task.space, made_by, task.n_pairs, execution, measure_own)
    if execution.main:
        report_unreadable(task.splits)
    if n_measured and execution.main:
        a_minute = 60 * n_measured / (time.perf_counter() - started)
        pace = f"{a_minute:.1f} subnets a minute on {execution.world_size} process(es)"
        print(f"{n_measured} pairs measured, {pace}", file=sys.stderr)
    return made_by


def origin_of_pairs(task: Preparation, seed: int, weights: str) -> Record:
    """All that the pairs depend on besides the space, as plain data. `weights` is the supernet's digest.

    Uniform pairs have no strata in it, as those of older versions.
    """
    recipe = task.recipe
    made_by: Record = {
        "seed": seed,
        "recalibration_images": recipe.recalibration_images,
        "supernet": weights,
        "images": task.splits.source,
    }
    if task.quantized and recipe.pair_strata is not None:
        made_by["strata"] = asdict(recipe.pair_strata)
    if not task.as_is:
        made_by["finetune"] = asdict(recipe.pair_finetune)
        made_by["quantizer"] = recipe.quantizer
        if recipe.pair_epoch_images is not None:
            made_by["epoch_images"] = recipe.pair_epoch_images
    return made_by


def fit(task: Preparation, made_by: Record, config: PredictorConfig, device: torch.device, *, as_json: bool) -> None:
    """Train the predictor on the gathered pairs, save it, print its scores and what is wrong with them.

    For finetuned pairs, which are few, it is transferred from the float predictor. Others start from random weights.
    """
    target = task.target
    genes, accuracies = task.store.load(task.space, task.n_pairs)
    rule, outliers = task.recipe.pair_outliers if task.quantized else None, None
    outliers_facts: Record = {}
    if rule is not None:
        outliers = outliers_among(task.space, genes, accuracies, rule)
        outliers_facts = {"outliers": {"n": int(outliers.sum()), **asdict(rule)}}
        print(f"{outliers.sum()} of {len(outliers)} pairs are outliers, not trained on", file=sys.stderr)
    how = {"quantize": task.quantized, "initial": task.initial, "config": config, "outliers": outliers}
    asked = training_record(genes, accuracies, **how)
    # Training takes seconds, so the state of another training is dropped. That of a kernel is not kept.
    state_file = task.folder.state_of(target)
    resume = Resume(state_file, asked, "predictor training", restart=True, every_s=SAVE_SECONDS)
    if task.members:
        predictor, scores = train_predictor(genes, accuracies, task.space, **how, device=device, resume=resume)
    else:
        predictor, scores = scored_kernel(genes, accuracies, task.space, **how)
    _, held_out = holdout_split(len(genes), config.holdout, config.seed)
    bands = bands_of(predictor, genes[held_out], accuracies[held_out])
    n_val = len(task.splits.val)
    facts = {
        "data": {"pairs": str(task.store.path), "n_pairs": len(genes), "n_val": n_val, **outliers_facts, **made_by},
        "scores": asdict(scores),
        "bands": bands.record(),
        "predictor_training": asdict(config) if task.members else kernel_settings(config),
    }
    with task.folder.locked() as lock:
        lock.publishing(target)
        save_predictor(target, predictor, facts)
    resume.done()
    if as_json:
        told = {"tau_interval": scores.tau_interval, "warnings": scores.warnings()}
        print(json.dumps({"predictor": str(target), **facts, **told}))
        return
    print(f"{target}: trained on {scores.n_train} pairs of {task.store.path}, held out {scores.n_holdout}")
    print(f"held out: {scores}")
    print(f"held out, in bands of {UNITS[bands.quantity]}:\n{table(bands.rows())}")
    print(f"accuracies are of {resolution(float(accuracies.mean()), n_val)}")
    for line in cautions(scores):
        print(f"{line}; gather more pairs (--acc_train_sample N --overwrite) or train the supernet longer")
