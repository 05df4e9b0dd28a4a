"""The work of `search.py --mode ddpg`: load the network, search its bits, record, print."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from apq.checkpoint import digest, load_checkpoint
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.files import SAVE_SECONDS, Record
from apq.layers import FIXED_BITS, ConvLayer
from apq.model import ModelSpec, model_to_dict
from apq.model_folder import ModelFolder
from apq.policy import QUANTIZERS, PolicyQuantizer, layer_names, load_strategy, policy_from_strategy
from apq.resume import Resume
from dataset import check_classes, image_folder, load_splits, names_of_outputs, recorded_folder
from dataset.class_names import read_class_names
from dataset.imagenet import report_unreadable
from dataset.splits import Splits
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.named_models import check_known
from elastic_nn.networks.subnet_file import load_float_subnet
from elastic_nn.training.distributed import check_agreement, processes
from elastic_nn.training.haq_recipes import haq_recipe_of
from elastic_nn.training.progress import Progress
from elastic_nn.training.pruned import weights_left
from elastic_nn.training.recipe import Recipe, TrainConfig, adjusted
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution, Session
from lut.cost_model import CostModel, cost_model_from_flags
from lut.measured import load_measured
from methods.search.bit_environment import BitEnvironment
from methods.search.bit_search import (
    FoundPolicy,
    Task,
    environment_of,
    layers_of_model,
    make_task,
    search_bits,
)
from methods.search.flags import agent_config
from methods.search.policy_result import choice_of, report, result_of, store
from methods.search.settings import METRICS, STEPS, AgentConfig, BitSearch, PolicySearch

AGENT_STATE = "agent.state.pt"  # in the folder of an unfinished experiment


def load_float(model: str, weights: Path | None) -> tuple[nn.Module, ModelSpec, Record | None, Path]:
    """The trained float network, its spec, the identity of its images if known, and its file.

    `model` is a name or the folder of an experiment. UserError where there are no weights.
    """
    if "/" in model:
        if weights is not None:
            raise UserError(f"{model} has its own weights: leave --weights out")
        experiment = Experiment(Path(model))
        if experiment.policy.exists():
            raise UserError(f"{model} holds the policy of a network: name that network, or the experiment of a subnet")
        if ModelFolder(Path(model)).model.exists():
            raise UserError(f"{model} is not an experiment: give a network in models/ by its name, {Path(model).name}")
        return *load_float_subnet(experiment), experiment.best_checkpoint
    file = weights or ModelFolder(Path("models") / model).model
    if not file.exists():
        check_known(model)
        raise UserError(f"no weights at {file}: train them (train.py --model {model}) or give a file with --weights")
    return *load_model(file, model), file


def search(args: argparse.Namespace) -> None:
    """Search the bits of a network, or take them from a file; record and print them."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite)
    device, agent = resolve_device(args.device), agent_config(args)
    net, spec, images, file = load_float(args.model, args.weights)
    recipe = get_recipe(args.recipe or haq_recipe_of(spec, args.quantizer), spec)
    config = PolicySearch(bits=bit_search(args, recipe), agent=agent, train=episode_finetune(args, recipe))
    if args.policy is not None:
        check_no_search_flags(args, config)
    cost_model = cost_model_of(args, layers_of_model(net, spec), config.bits.quantity)
    pruned = config.bits.is_pruned
    task = make_task(net, spec, config.bits.quantizer, config.bits.quantity, cost_model, is_pruned=pruned)
    if args.policy is None:
        warn_of_no_limit(environment_of(task, config.bits))  # which refuses a budget that no bits meet
    data = image_folder(args.data, load_checkpoint(file).get("data"))
    outputs = names_of_outputs(images) if args.classes is None else read_class_names(args.classes)
    splits = load_splits(spec, data, recipe.color_jitter, outputs)  # last: drawing or listing images may take long
    check_classes(splits, images, file)
    weights = {key: tensor.clone() for key, tensor in net.state_dict().items()}  # a search quantizes the network
    with processes(device, Execution(deterministic=args.deterministic)) as execution:
        if args.policy is not None:
            found = given_policy(args.policy, task, config.bits)
        else:
            session = Session(splits=splits, device=device, seed=args.seed, execution=execution)
            asked = asked_of(config, task, weights, splits)
            check_agreement(asked, execution)
            file, kept = experiment.path / AGENT_STATE, {"every_s": SAVE_SECONDS, "writes": execution.main}
            resume = Resume(file, asked, "search", args.overwrite, **kept)
            found = with_progress(task, config, session, resume)
        if not execution.main:
            return
    report_unreadable(splits)
    choice = choice_of(task, config.bits, found, args.model, recipe.name)
    settings = {"agent": asdict(config.agent) if found.episodes else None, **recorded_folder(data)}
    if pruned and QUANTIZERS[config.bits.quantizer].weights_only:
        settings["weights_left"] = weights_left(net, layer_names(task.layers))
    result = result_of("ddpg", choice, task, config.bits, found, settings)
    store(experiment, result, spec, weights, splits.source)
    report(experiment, result, cost_model, as_json=args.json)


def warn_of_no_limit(environment: BitEnvironment) -> None:
    """Say on stderr that a budget is not below the cost of the most bits, so that it limits nothing."""
    if environment.budget >= (most := environment.most()):
        what = f"the budget of {environment.budget:.6g} {environment.costs.unit}"
        print(f"warning: {what} limits nothing: the most bits need {most:.6g}", file=sys.stderr)


def check_no_search_flags(args: argparse.Namespace, config: PolicySearch) -> None:
    """UserError for flags of the search together with --policy."""
    episode = (args.finetune_epoch, args.finetune_lr, args.finetune_gamma, args.reward)
    if args.use_top5 or args.steps != STEPS[0] or episode != (None,) * len(episode):
        raise UserError("--policy takes the bits as they are: leave the flags of episodes out")
    if (config.bits.budget, args.preserve_ratio, config.agent) != (None, None, AgentConfig(seed=args.seed)):
        raise UserError("--policy takes the bits as they are: leave the budget and the agent's flags out")


def cost_model_of(args: argparse.Namespace, layers: list[ConvLayer], quantity: str) -> CostModel:
    """The cost model that the flags name. A --table in CSV form has costs measured for these layers."""
    if args.table is not None and args.table.suffix.lower() == ".csv":
        return load_measured(args.table, layer_names(layers), quantity)
    return cost_model_from_flags(args.config, args.table)


def asked_of(config: PolicySearch, task: Task, weights: dict[str, Tensor], splits: Splits) -> Record:
    """All that the result of a search depends on, as plain data."""
    return {
        "model": model_to_dict(task.spec),
        "weights": digest(weights),
        **config.record(),
        "images": splits.source,
        "cells": digest({"cells": torch.from_numpy(task.costs.cells)}),
    }


def bit_search(args: argparse.Namespace, recipe: Recipe) -> BitSearch:
    """The settings in the flags."""
    quantizer = QUANTIZERS[args.quantizer]
    if args.constraint is not None and args.preserve_ratio is not None:
        raise UserError("give one budget: --constraint or --preserve_ratio")
    if not quantizer.priced and (args.table is not None or args.image_bits != FIXED_BITS):
        raise UserError(f"{args.quantizer} weights have no cost on an accelerator: leave --table and --image_bits out")
    return BitSearch(
        quantizer=args.quantizer,
        quantity=args.type or ("latency" if quantizer.priced else "size"),
        ratio=quantizer.ratio if args.preserve_ratio is None else args.preserve_ratio,
        budget=args.constraint,
        min_bit=quantizer.fewest if args.min_bit is None else args.min_bit,
        max_bit=quantizer.most if args.max_bit is None else args.max_bit,
        keep_ends=keeps_ends(quantizer) if args.keep_ends is None else args.keep_ends,
        image_bits=args.image_bits,
        train_images=args.finetune_images or recipe.episode_images,
        val_images=args.val_images or recipe.episode_val_images,
        reward=args.reward or recipe.reward,
        metric=METRICS[1] if args.use_top5 else METRICS[0],
        steps=args.steps,
        is_pruned=args.is_pruned,
    )


def episode_finetune(args: argparse.Namespace, recipe: Recipe) -> TrainConfig:
    """The finetune of an episode: the recipe's, with the changes in the flags. --finetune_gamma is a schedule."""
    config = adjusted(recipe.episode, epochs=args.finetune_epoch, lr=args.finetune_lr)
    if args.finetune_gamma is None:
        return config
    return replace(config, schedule="exponential", gamma=args.finetune_gamma)


def keeps_ends(quantizer: PolicyQuantizer) -> bool:
    """Whether the first and last layer keep 8 bits by default: where activations are quantized too, as published."""
    return not quantizer.weights_only and FIXED_BITS in quantizer.bits


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
