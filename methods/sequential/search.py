"""The work of `search.py --mode sequential`: load, run the three stages, record, print."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from apq.cli import table
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import get_experiment
from apq.model_folder import ModelFolder
from apq.space import SearchSpace
from dataset import check_classes, load_splits
from dataset.imagenet import tell_unreadable
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.quantizers import FLOAT
from elastic_nn.training.distributed import processes
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from lut.cost_model import cost_model_from_flags
from methods.search.bit_search import make_task
from methods.search.flags import agent_config, evolution_config
from methods.search.policy_result import facts_of, record, report
from methods.sequential.config import SequentialConfig, Split
from methods.sequential.pipeline import Sequential, run_sequential
from utils.predictor_files import load_predictor

DEFAULT_RATIO = Split(constraint=1.0).preserve_ratio


def search(args: argparse.Namespace) -> None:
    """Search architecture, widths and bits one after the other; record and print the result."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite)
    device, folder = resolve_device(args.device), ModelFolder(args.acc_predictor_dir)
    supernet, origin = load_supernet(folder.supernet)
    if supernet.scheme != FLOAT:
        raise UserError(f"{folder.supernet} was trained quantized: the sequential baseline needs a float supernet")
    space = supernet.space
    predictor = load_predictor(folder.acc, space)
    splits, recipe = load_splits(space, args.data), get_recipe(args.recipe or origin.recipe, space)
    check_classes(splits, origin.images, folder.supernet)
    config, cost_model = sequential_config(args, space, recipe), cost_model_from_flags(args.config, None)
    with processes(device) as execution, tqdm(disable=None if execution.main else True) as bar:

        def log(stage: str, made: dict[str, Any]) -> None:
            bar.set_description(stage, refresh=False)
            bar.update()

        found = run_sequential(
            config,
            supernet,
            predictor,
            splits,
            recipe,
            cost_model,
            experiment.path,
            seed=args.seed,
            device=device,
            execution=execution,
            restart=args.overwrite,
            log=log,
        )
        if not execution.main:
            return
    tell_unreadable(splits)
    task = make_task(found.net, found.spec, splits, "linear", config.quantity, cost_model)
    settings = {
        "mode": "sequential",
        "model": str(args.acc_predictor_dir),
        "recipe": recipe.name,
        **facts_of(found.policy, task, config.bits, found.bits, found.original),
        "sequential": asdict(config),
        "stages": [asdict(stage) for stage in found.stages],
        **cost_model.record(),
        "measured": None,
    }
    state = {key: tensor.cpu() for key, tensor in found.net.state_dict().items()}
    record(experiment, task, found.policy, found.bits, settings, found.spec, state)
    found.remove_states(experiment.path)
    if not args.json:
        print(table(stage_rows(found, task.costs.unit)))
    report(args.json, experiment, found.policy, settings, cost_model)


def sequential_config(args: argparse.Namespace, space: SearchSpace, recipe: Recipe) -> SequentialConfig:
    """The settings that the flags and the recipe give; bits lie between the fewest and the most of the space."""
    agent, choices = agent_config(args), sorted({bits for kind in space.operands for bits in kind.choices})
    epochs = args.prune_epochs or recipe.finetune.epochs
    return SequentialConfig(
        quantity=args.type,
        split=Split(
            constraint=args.constraint,
            prune_ratio=args.prune_ratio,
            preserve_ratio=DEFAULT_RATIO if args.preserve_ratio is None else args.preserve_ratio,
            architecture=args.arch_constraint,
        ),
        evolution=evolution_config(args),
        pruning_agent=replace(agent, episodes=args.prune_episode or agent.episodes),
        recalibration_images=min(recipe.recalibration_images, recipe.episode_images),
        finetune=replace(recipe.finetune, epochs=epochs),
        bits_agent=agent,
        train_images=args.finetune_images or recipe.episode_images,
        val_images=args.val_images or recipe.episode_val_images,
        min_bit=choices[0] if args.min_bit is None else args.min_bit,
        max_bit=choices[-1] if args.max_bit is None else args.max_bit,
    )


def stage_rows(found: Sequential, unit: str) -> list[tuple[str, ...]]:
    """The stages as rows of a printed table."""
    rows = [
        (stage.stage, f"{stage.budget:.4g}", f"{stage.cost:.4g}", f"{stage.accuracy:.2%}", stage.measured)
        for stage in found.stages
    ]
    return [("stage", f"budget, {unit}", f"cost, {unit}", "top-1", "of what"), *rows]
