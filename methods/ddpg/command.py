"""The command line of HAQ: `search.py --mode ddpg`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from apq.checkpoint import digest
from apq.cli import table
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.model import ModelSpec, model_to_dict
from apq.model_folder import ModelFolder
from apq.policy import Policy, load_strategy, policy_from_strategy
from dataset import check_classes, load_splits
from dataset.imagenet import tell_unreadable
from elastic_nn.networks.model_file import load_model, save_model
from elastic_nn.networks.named_models import check_known
from elastic_nn.networks.subnet_file import load_float_subnet
from elastic_nn.training.distributed import check_agreement, processes
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution
from lut.costs import cost_source
from methods.ddpg.agent import AgentConfig
from methods.ddpg.bit_search import BitSearch, Task, make_task, search_bits
from methods.ddpg.ddpg_finder import Found
from methods.ddpg.flags import agent_config, bit_search
from utils.plots import plot_episodes, plot_policy


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


def run(args: argparse.Namespace) -> None:
    """Search the bits of a network, or take those of a file; record and print them."""
    if args.model is None:
        raise UserError("--mode ddpg needs --model, the network whose bits to choose")
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
    source = cost_source(args.config, None if measured else args.table)
    task = make_task(net, spec, splits, config.quantizer, config.quantity, measured or source)
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
        **source.record(),
        "measured": measured and str(measured),
    }
    record(experiment, task, policy, found, settings, spec, state)
    report(args.json, experiment, policy, settings, source if measured is None else f"table {measured}")


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


def facts_of(
    policy: Policy, task: Task, config: BitSearch, found: Found | None, original: float | None
) -> dict[str, Any]:
    """What is known of a policy, as plain data."""
    bits = policy.matrix(config.image_bits)
    budget = config.ratio * task.costs.reference if config.budget is None else config.budget
    return {
        "search": asdict(config),
        "type": config.quantity,
        "unit": task.costs.unit,
        "image_bits": config.image_bits,
        "budget": budget if found else None,
        "cost": task.costs.total(bits),
        "ratio": task.costs.ratio(bits),
        "of_what": task.costs.of_what,
        "n_priced": task.costs.n_priced,
        "original_top1": original,
        "episode": found.record if found else None,
    }


def record(
    experiment: Experiment,
    task: Task,
    policy: Policy,
    found: Found | None,
    settings: dict[str, Any],
    spec: ModelSpec,
    state: dict[str, torch.Tensor],
) -> None:
    """Write the experiment: float weights, figures, policy."""
    with experiment.replaced() as new:
        save_model(new.model, spec, state, task.splits.source)
        if found:
            plot_episodes(found.history, new.plot, original=settings["original_top1"])
        plot_policy(policy, task.layers, new.bits_plot)
        new.save_policy(policy, task.layers, settings["cost"], settings, found.history if found else [])


def report(as_json: bool, experiment: Experiment, policy: Policy, settings: dict[str, Any], priced_by: object) -> None:
    """Print a policy and its cost."""
    shown = ("type", "unit", "budget", "cost", "ratio", "of_what", "original_top1", "episode")
    if as_json:
        facts = {key: settings[key] for key in shown}
        print(
            json.dumps(
                {"exp_dir": str(experiment.path), **facts, "priced_by": str(priced_by), "policy": policy.strategy}
            )
        )
        return
    print(f"{experiment.path}: {policy.quantizer} policy of {settings['model']}")
    print(table(bit_rows(policy)))
    quantity = f"{settings['type']} {settings['cost']:g} {settings['unit']}"
    covered = (
        f" (of the {settings['n_priced']} layers in the table)" if settings["n_priced"] < len(policy.names) else ""
    )
    print(f"{quantity}, {settings['ratio']:.4f} of {settings['of_what']}{covered}")
    if settings["episode"]:
        best = settings["episode"]
        print(
            f"top-1 {best['accuracy']:.2%} after the short finetune of episode {best['episode']}, "
            f"{settings['original_top1']:.2%} in floating point ({settings['search']['val_images']} validation images)"
        )
    if settings["type"] in ("latency", "energy"):
        print(f"{settings['type']}: {priced_by}")


def bit_rows(policy: Policy) -> list[tuple[str, ...]]:
    """Rows of a printed table of bits."""
    titles = ("layer", "weight bits", "activation bits")[: 1 + len(policy.bits[0])]
    rows: Sequence[tuple[str, ...]] = [
        (name, *("image" if b < 0 else str(b) for b in row))
        for name, row in zip(policy.names, policy.bits, strict=True)
    ]
    return [titles, *rows]
