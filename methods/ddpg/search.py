"""The work of `search.py --mode ddpg`: load the network, search its bits, record, print."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from apq.checkpoint import digest
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.layers import FIXED_BITS
from apq.model import ModelSpec, model_to_dict
from apq.model_folder import ModelFolder
from apq.policy import QUANTIZERS, Policy, layer_names, load_strategy, policy_from_strategy
from dataset import check_classes, load_splits
from dataset.imagenet import tell_unreadable
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.named_models import check_known
from elastic_nn.networks.subnet_file import load_float_subnet
from elastic_nn.training.distributed import check_agreement, processes
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution
from lut.cost_model import cost_model_from_flags
from lut.measured import load_measured
from methods.search.bit_search import Task, layers_of_model, make_task, search_bits
from methods.search.episodes import Found
from methods.search.flags import agent_config
from methods.search.policy_result import facts_of, record, report
from methods.search.settings import AgentConfig, BitSearch

DEFAULT_RATIO = {"linear": 0.6, "kmeans": 0.1}  # HAQ's, of the 8-bit cost and of the 32-bit size


def load_float(model: str, weights: Path | None) -> tuple[nn.Module, ModelSpec, dict[str, Any] | None, Path]:
    """The trained float network, its spec, the identity of its images where known, and the file it came from."""
    if "/" in model:
        if weights is not None:
            raise UserError(f"{model} has its own weights: leave --weights out")
        experiment = Experiment(Path(model))
        if experiment.policy.exists():
            raise UserError(f"{model} holds the policy of a network: name that network, or a found subnet's experiment")
        if ModelFolder(Path(model)).model.exists():
            raise UserError(f"{model} is not an experiment: a network of models/ goes by its name, {Path(model).name}")
        return *load_float_subnet(experiment), experiment.best_checkpoint
    file = weights or ModelFolder(Path("models") / model).model
    if not file.exists():
        check_known(model)
        raise UserError(f"no weights at {file}: train them (train.py --model {model}) or name a file with --weights")
    return *load_model(file, model), file


def search(args: argparse.Namespace) -> None:
    """Search the bits of a network, or take those of a file; record and print them."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite)
    device = resolve_device(args.device)
    net, spec, images, file = load_float(args.model, args.weights)
    splits = load_splits(spec, args.data)
    check_classes(splits, images, file)
    recipe = get_recipe(args.recipe, spec)
    config, agent = bit_search(args, recipe), agent_config(args)
    if args.policy is not None and (config.budget, args.preserve_ratio, agent) != (
        None,
        None,
        AgentConfig(seed=args.seed),
    ):
        raise UserError("--policy takes the bits as they are: leave the budget and the agent's flags out")
    measured = args.table if args.table is not None and args.table.suffix == ".csv" else None
    if measured:
        cost_model = load_measured(measured, layer_names(layers_of_model(net, spec)), config.quantity)
    else:
        cost_model = cost_model_from_flags(args.config, args.table)
    task = make_task(net, spec, splits, config.quantizer, config.quantity, cost_model)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}  # a search quantizes the network
    with processes(device) as execution:
        if args.policy is not None:
            policy, found, original = given_policy(args.policy, task, config), None, None
        else:
            asked = {
                "model": model_to_dict(spec),
                "weights": digest(state),
                "search": asdict(config),
                "agent": asdict(agent),
                "train": asdict(recipe.pair_finetune),
                "images": splits.source,
                "cells": digest({"cells": torch.from_numpy(task.costs.cells)}),
            }
            check_agreement(asked, execution)
            policy, found, original = with_progress(
                experiment, task, config, agent, recipe, execution, device, asked, args.overwrite
            )
        if not execution.main:
            return
    tell_unreadable(splits)
    settings = {
        "mode": "ddpg",
        "model": args.model,
        "recipe": recipe.name,
        **facts_of(policy, task, config, found, original),
        "agent": asdict(agent) if found else None,
        **cost_model.record(),
        "measured": measured and str(measured),
    }
    record(experiment, task, policy, found, settings, spec, state)
    report(args.json, experiment, policy, settings, cost_model)


def bit_search(args: argparse.Namespace, recipe: Recipe) -> BitSearch:
    """The settings that the flags give."""
    kmeans = args.quantizer == "kmeans"
    if args.constraint is not None and args.preserve_ratio is not None:
        raise UserError("give one budget: --constraint or --preserve_ratio")
    if kmeans and (args.table is not None or args.image_bits != FIXED_BITS):
        raise UserError("k-means weights have no price on an accelerator: leave --table and --image_bits out")
    return BitSearch(
        quantizer=args.quantizer,
        quantity=args.type or ("size" if kmeans else "latency"),
        ratio=DEFAULT_RATIO[args.quantizer] if args.preserve_ratio is None else args.preserve_ratio,
        budget=args.constraint,
        min_bit=QUANTIZERS[args.quantizer][0] if args.min_bit is None else args.min_bit,
        max_bit=QUANTIZERS[args.quantizer][1] if args.max_bit is None else args.max_bit,
        keep_ends=not kmeans if args.keep_ends is None else args.keep_ends,
        image_bits=args.image_bits,
        train_images=args.finetune_images or recipe.episode_images,
        val_images=args.val_images or recipe.episode_val_images,
    )


def given_policy(file: Path, task: Task, config: BitSearch) -> Policy:
    """The policy of a file, for this network."""
    strategy = load_strategy(file)
    try:
        policy = policy_from_strategy(config.quantizer, task.layers, strategy)
        task.costs.check_priced(policy.matrix(config.image_bits))
        return policy
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def with_progress(
    experiment: Experiment,
    task: Task,
    config: BitSearch,
    agent: AgentConfig,
    recipe: Recipe,
    execution: Execution,
    device: torch.device,
    asked: dict[str, Any],
    restart: bool,
) -> tuple[Policy, Found, float]:
    """`search_bits` with a progress bar and its state in the experiment."""
    with tqdm(total=agent.episodes, desc="episodes", disable=None if execution.main else True) as bar:

        def log(record: dict[str, Any]) -> None:
            bar.set_postfix(top1=f"{record['accuracy']:.4f}", best=f"{record['best_reward']:.2f}")
            bar.update()

        return search_bits(
            task,
            config,
            agent,
            recipe,
            device=device,
            execution=execution,
            state_file=experiment.agent_state,
            asked=asked,
            restart=restart,
            log=log,
        )
