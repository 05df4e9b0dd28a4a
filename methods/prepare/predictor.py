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
from elastic_nn.training.distributed import by_first, joined, locked_by_first
from elastic_nn.training.missing_pairs import gather_missing
from elastic_nn.training.pairs import gather_as_is, gather_finetuned, origin_of_pairs
from elastic_nn.training.session import Execution, Session
from lut.costs import UNITS
from methods.prepare.plan import Preparation, check
from methods.search.archive import Archive, without_draws
from methods.search.surrogate import Surrogate
from utils.predictor_files import save_predictor
from utils.predictor_scores import cautions, resolution
from utils.predictor_training import PredictorConfig, member_width


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
    made_by = origin_of(task, session.seed)
    measure = gather_as_is if task.as_is else gather_finetuned
    if task.quantized:
        by_first(archive_of(task, made_by).load, execution)  # one of other work is told before any measurement
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


def origin_of(task: Preparation, seed: int) -> Record:
    """All that the pairs depend on besides the space, as plain data.

    Uniform pairs have no strata in it, as those of older versions.
    """
    weights = digest(task.supernet.state_dict())
    made_by = origin_of_pairs(task.supernet, weights, task.recipe, task.splits.source, seed)
    if task.quantized and task.recipe.pair_strata is not None:
        made_by["strata"] = asdict(task.recipe.pair_strata)
    return made_by


def surrogate_of(task: Preparation, made_by: Record, config: PredictorConfig) -> Surrogate:
    """The predictor to train on the pairs of the task, and on what searches have measured of this supernet."""
    genes, accuracies = task.store.load(task.space, task.n_pairs)
    surrogate = Surrogate(
        space=task.space,
        quantize=task.quantized,
        genes=genes,
        accuracies=accuracies,
        config=config,
        is_kernel=not task.members,
        initial=task.initial,
        rule=task.recipe.pair_outliers if task.quantized else None,
    )
    return surrogate.with_measured(*archive_of(task, made_by).load()) if task.quantized else surrogate


def archive_of(task: Preparation, made_by: Record) -> Archive:
    """What searches have measured of the supernet, in the way of these pairs."""
    return Archive(store=task.store.measured(), space=task.space, made_by=without_draws(made_by))


def fit(task: Preparation, made_by: Record, config: PredictorConfig, device: torch.device, *, as_json: bool) -> None:
    """Train the predictor on the gathered pairs, save it, print its scores and what is wrong with them.

    For finetuned pairs, which are few, it is transferred from the float predictor. Others start from random weights.
    Subnets that searches have measured in the same way are added to quantized pairs.
    """
    target, surrogate = task.target, surrogate_of(task, made_by, config)
    facts_of_pairs: Record = {}
    if (outliers := surrogate.outliers) is not None:
        facts_of_pairs = {"outliers": {"n": int(outliers.sum()), **asdict(surrogate.rule)}}
        print(f"{outliers.sum()} of {len(outliers)} pairs are outliers, not trained on", file=sys.stderr)
    if surrogate.n_measured:
        facts_of_pairs["n_measured"] = surrogate.n_measured
    # Training takes seconds, so the state of another training is dropped.
    state_file = task.folder.state_of(target)
    resume = Resume(state_file, surrogate.asked(), "predictor training", restart=True, every_s=SAVE_SECONDS)
    predictor, scores, bands = surrogate.trained(device, resume)
    n_val, n_pairs = len(task.splits.val), len(surrogate.genes) - surrogate.n_measured
    facts = {
        "data": {"pairs": str(task.store.path), "n_pairs": n_pairs, "n_val": n_val, **facts_of_pairs, **made_by},
        "scores": asdict(scores),
        "bands": bands.record(),
        "predictor_training": surrogate.settings(),
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
    if surrogate.n_measured:
        print(f"{surrogate.n_measured} of them are subnets that searches have measured")
    print(f"held out: {scores}")
    print(f"held out, in bands of {UNITS[bands.quantity]}:\n{table(bands.rows())}")
    print(f"accuracies are of {resolution(float(surrogate.accuracies.mean()), n_val)}")
    for line in cautions(scores):
        print(f"{line}; gather more pairs (--acc_train_sample N --overwrite) or train the supernet longer")
