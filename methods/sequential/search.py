"""The work of `search.py --mode sequential`: load, run the three stages, record, print."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace

from apq.cli import table
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import get_experiment
from apq.files import SAVE_SECONDS, Record
from apq.model_folder import ModelFolder
from apq.resume import Resume
from apq.search_result import SearchResult
from apq.space import SearchSpace
from dataset import check_classes, image_folder, load_splits, names_of_outputs, recorded_folder
from dataset.imagenet import report_unreadable
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.training.distributed import processes
from elastic_nn.training.progress import Progress
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution, Session
from lut.cost_model import cost_model_from_flags
from lut.costs import check_priced
from methods.search.bit_search import make_task
from methods.search.flags import agent_config, evolution_config
from methods.search.policy_result import choice_of, report, result_of, store
from methods.sequential.config import SequentialConfig, Split
from methods.sequential.pipeline import STATE, Parts, Sequential, asked_of, remove_states, run_sequential
from utils.predictor_files import load_predictor, load_scores
from utils.predictor_scores import cautions

DEFAULT_RATIO = Split(constraint=1.0).preserve_ratio


def search(args: argparse.Namespace) -> None:
    """Search architecture, channels and bits one after the other; record and print the result."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    experiment.check_free(args.overwrite)
    device, folder = resolve_device(args.device), ModelFolder(args.acc_predictor_dir)
    supernet, origin = load_supernet(folder.supernet)
    if supernet.scheme.quantizes:
        raise UserError(f"{folder.supernet} was trained quantized: the sequential baseline needs a float supernet")
    space = supernet.space
    recipe = get_recipe(args.recipe or origin.recipe, space)
    config, cost_model = sequential_config(args, space, recipe), cost_model_from_flags(args.config, None)
    check_priced(space, cost_model)
    predictor = load_predictor(folder.acc, space)
    parts = Parts(supernet=supernet, predictor=predictor, recipe=recipe, cost_model=cost_model)
    for line in cautions(load_scores(folder.acc)):
        print(line, file=sys.stderr)
    data = image_folder(args.data, origin.data)
    outputs = names_of_outputs(origin.images)
    splits = load_splits(space, data, recipe.color_jitter, outputs)  # last: drawing or listing images may take long
    check_classes(splits, origin.images, folder.supernet)
    with processes(device, Execution(deterministic=args.deterministic)) as execution:
        session = Session(splits=splits, device=device, seed=args.seed, execution=execution)
        asked, kept = asked_of(config, parts, session), {"every_s": SAVE_SECONDS, "writes": execution.main}
        resume = Resume(experiment.path / STATE, asked, "search", args.overwrite, **kept)
        found = with_progress(config, parts, session, resume)
        if not execution.main:
            return
    report_unreadable(splits)
    result = result_of_stages(found, config, parts, str(args.acc_predictor_dir))
    result = replace(result, settings={**result.settings, **recorded_folder(data)})
    weights = {key: tensor.cpu() for key, tensor in found.net.state_dict().items()}
    store(experiment, result, found.spec, weights, splits.source)
    remove_states(resume)
    if not args.json:
        print(table(stage_rows(found, result.unit)))
    report(experiment, result, cost_model, as_json=args.json)


def with_progress(config: SequentialConfig, parts: Parts, session: Session, resume: Resume) -> Sequential:
    """`run_sequential` that shows its progress: the records of each stage are counted."""
    with Progress(what="architecture", shown=session.execution.main) as bar:

        def log(stage: str, record: Record) -> None:
            bar.start(stage)
            bar.update()

        return run_sequential(config, parts, session, resume, log)


def result_of_stages(found: Sequential, config: SequentialConfig, parts: Parts, model: str) -> SearchResult:
    """The SearchResult of a run. `model` is the folder of the supernet and the predictor."""
    task = make_task(found.net, found.spec, config.quantizer, config.quantity, parts.cost_model)
    choice = choice_of(task, config.bits, found.bits, model, parts.recipe.name)
    settings = {"sequential": asdict(config), "stages": [asdict(stage) for stage in found.stages]}
    return result_of("sequential", choice, task, config.bits, found.bits, settings)


def sequential_config(args: argparse.Namespace, space: SearchSpace, recipe: Recipe) -> SequentialConfig:
    """The settings in the flags and the recipe. The range of bits defaults to that of the space."""
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
        quantizer=args.quantizer,
    )


def stage_rows(found: Sequential, unit: str) -> list[tuple[str, ...]]:
    """The stages as rows of a printed table."""
    rows = [
        (stage.stage, f"{stage.budget:.4g}", f"{stage.cost:.4g}", f"{stage.accuracy:.2%}", stage.measured)
        for stage in found.stages
    ]
    return [("stage", f"budget, {unit}", f"cost, {unit}", "top-1", "of what"), *rows]
