"""The work of `search.py --mode ddpg`: load the network, search its bits, record, print."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import get_experiment
from apq.files import SAVE_SECONDS, Record
from apq.policy import load_strategy, policy_from_strategy
from apq.resume import Resume
from dataset.imagenet import report_unreadable
from dataset.splits import Splits
from elastic_nn.training.distributed import check_agreement, processes
from elastic_nn.training.progress import Progress
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.session import Execution, Session
from methods.search.bit_search import FoundPolicy, Task, choices_of, search_bits
from methods.search.flags import agent_config
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
from methods.search.settings import METRICS, STEPS, AgentConfig, BitSearch, PolicySearch

AGENT_STATE = "agent.state.pt"  # in the folder of an unfinished experiment


def search(args: argparse.Namespace) -> None:
    """Search the bits of a network, or take them from a file; record and print them."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite)
    device, agent = resolve_device(args.device), agent_config(args)
    network = load_network(args)
    recipe = network.recipe
    config = PolicySearch(bits=agent_bits(args, recipe), agent=agent, train=episode_finetune(args, recipe))
    if args.policy is not None:
        check_no_search_flags(args, config)
    task = load_task(args, network, config.bits)
    if args.policy is None:
        warn_of_no_limit(choices_of(task, config.bits))  # which refuses a budget that no bits meet
    splits, data = load_images(args, network)  # last, because it may take long
    with processes(device, Execution(deterministic=args.deterministic)) as execution:
        if args.policy is not None:
            found = given_policy(args.policy, task, config.bits)
        else:
            session = Session(splits=splits, device=device, seed=args.seed, execution=execution)
            asked = asked_of(config, task, network, splits)
            check_agreement(asked, execution)
            file, kept = experiment.path / AGENT_STATE, {"every_s": SAVE_SECONDS, "writes": execution.main}
            resume = Resume(file, asked, "search", args.overwrite, **kept)
            found = with_progress(task, config, session, resume)
        if not execution.main:
            return
    report_unreadable(splits)
    choice = choice_of(task, config.bits, found, args.model, recipe.name)
    settings = {"agent": asdict(config.agent) if found.episode else None, **settings_of(task, config.bits, data)}
    result = result_of("ddpg", choice, task, config.bits, found, settings)
    store(experiment, result, network.spec, network.weights, splits.source)
    report(experiment, result, task.cost_model, as_json=args.json)


def agent_bits(args: argparse.Namespace, recipe: Recipe) -> BitSearch:
    """The settings in the flags, those of the agent's rewards and steps among them."""
    return replace(bit_search(args, recipe), metric=METRICS[1] if args.use_top5 else METRICS[0], steps=args.steps)


def check_no_search_flags(args: argparse.Namespace, config: PolicySearch) -> None:
    """UserError for flags of the search together with --policy."""
    episode = (args.finetune_epoch, args.finetune_lr, args.finetune_gamma, args.reward)
    if args.use_top5 or args.steps != STEPS[0] or episode != (None,) * len(episode):
        raise UserError("--policy takes the bits as they are: leave the flags of episodes out")
    if (config.bits.budget, args.preserve_ratio, config.agent) != (None, None, AgentConfig(seed=args.seed)):
        raise UserError("--policy takes the bits as they are: leave the budget and the agent's flags out")


def asked_of(config: PolicySearch, task: Task, network: FloatNetwork, splits: Splits) -> Record:
    """All that the result of a search depends on, as plain data."""
    return {**network.origin(splits), **config.record(), "cells": costs_digest(task)}


def given_policy(file: Path, task: Task, config: BitSearch) -> FoundPolicy:
    """The policy in a file. UserError where it does not fit the network, or has bits without a known cost."""
    strategy = load_strategy(file)
    try:
        policy = policy_from_strategy(config.quantizer, task.layers, strategy)
        task.costs.check_priced(policy.matrix(config.image_bits))
        return FoundPolicy(policy=policy)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def with_progress(task: Task, config: PolicySearch, session: Session, resume: Resume) -> FoundPolicy:
    """`search_bits` that shows its progress."""
    total, shown = config.agent.episodes, session.execution.main
    with Progress(what="search", total=total, unit="episode", shown=shown) as bar:

        def log(record: Record) -> None:
            bar.update(top1=f"{record['accuracy']:.4f}", best=f"{record['best_reward']:.2f}")

        return search_bits(task, config, session, resume, log)
