"""The work of `search.py --mode sensitivity`: load the network, choose its bits, record, print."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial

from apq.device import resolve_device
from apq.experiment import Experiment, get_experiment
from apq.files import Record
from apq.policy import layer_names
from apq.resume import Journal
from dataset.imagenet import report_unreadable
from dataset.splits import Splits
from elastic_nn.training.distributed import by_first, check_agreement, processes
from elastic_nn.training.session import Execution, Session
from methods.search.bit_search import choices_of
from methods.search.float_network import (
    FloatNetwork,
    costs_digest,
    load_images,
    load_network,
    load_task,
    settings_of,
    warn_of_no_limit,
)
from methods.search.policy_flags import bit_search, episode_finetune
from methods.search.policy_result import choice_of, report, result_of, store
from methods.sensitivity.bits import BySensitivity, search_by_sensitivity
from methods.sensitivity.config import SensitivitySearch
from methods.sensitivity.losses import LossStore, cases_of
from report.plots import plot_sensitivities

STEM = "sensitivity.state"  # of the journal in the folder of an unfinished experiment
MODE = "sensitivity"


def search(args: argparse.Namespace) -> None:
    """Choose the bits of a network; record and print them."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite, continues=STEM)
    device, network = resolve_device(args.device), load_network(args)
    config = SensitivitySearch(
        bits=bit_search(args, network.recipe),
        train=episode_finetune(args, network.recipe),
        loss_images=args.loss_images,
    )
    task = load_task(args, network, config.bits)
    choices = choices_of(task, config.bits)  # refuses a budget that no bits meet
    warn_of_no_limit(choices)
    splits, data = load_images(args, network)  # last, because it may take long
    with processes(device, Execution(deterministic=args.deterministic)) as execution:
        session = Session(splits=splits, device=device, seed=args.seed, execution=execution)
        asked = asked_of(config, network, splits, session)
        check_agreement({**asked, **config.record(), "costs": costs_digest(task)}, execution)
        losses = LossStore(
            journal=journal_of(experiment, execution.rank),
            cases=cases_of(choices),
            names=layer_names(task.layers),
            made_by=asked,
            lenient=args.overwrite,
        )
        by_first(losses.begin, execution)
        chosen = search_by_sensitivity(task, config, session, losses)
        if not execution.main:
            return
    report_unreadable(splits)
    choice = choice_of(task, config.bits, chosen.found, args.model, network.recipe.name)
    settings = {MODE: {"seed": args.seed, "train": asdict(config.train), **chosen.record()}}
    settings |= settings_of(task, config.bits, data)
    result = result_of(MODE, choice, task, config.bits, chosen.found, settings)
    draw = partial(plot_sensitivities, result.history)
    store(experiment, result, network.spec, network.weights, splits.source, draw)
    report(experiment, result, task.cost_model, said(chosen), chosen.record(), as_json=args.json)


def asked_of(config: SensitivitySearch, network: FloatNetwork, splits: Splits, session: Session) -> Record:
    """All that the losses depend on, as plain data."""
    deterministic = {"deterministic": True} if session.execution.deterministic else {}
    return {MODE: {**config.of_losses(), "seed": session.seed, **deterministic}, **network.origin(splits)}


def journal_of(experiment: Experiment, rank: int) -> Journal:
    """The measured losses on disk, to which the process of this rank appends."""
    file, remedy = experiment.path / f"{STEM}.json", "give --overwrite to measure anew"
    return Journal(file, STEM, "search", remedy, rank)


def said(chosen: BySensitivity) -> str:
    """The losses in words."""
    return (
        f"loss {chosen.float_loss:.4f} in floating point on {chosen.n_images} training images; with these bits it "
        f"rises by {chosen.predicted:.4f} as predicted, {chosen.measured:.4f} as measured, before any finetune"
    )
