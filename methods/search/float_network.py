"""The trained float network of a search for bits: loaded, priced, with its images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apq.checkpoint import digest, load_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.layers import ConvLayer
from apq.model import ModelSpec, model_to_dict
from apq.model_folder import ModelFolder
from apq.policy import QUANTIZERS, layer_names
from dataset import check_classes, image_folder, load_splits, names_of_outputs, recorded_folder
from dataset.class_names import read_class_names
from dataset.splits import Splits
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.named_models import check_known
from elastic_nn.networks.pretrained import how_to_install, installed_weights
from elastic_nn.networks.subnet_file import load_float_subnet
from elastic_nn.training.haq_recipes import haq_recipe_of
from elastic_nn.training.pruned import weights_left
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from lut.cost_model import CostModel, cost_model_from_flags
from lut.measured import load_measured
from methods.search.bit_choices import BitChoices
from methods.search.bit_search import Task, layers_of_model, make_task
from methods.search.settings import BitSearch


@dataclass(frozen=True, kw_only=True)
class FloatNetwork:
    """A trained float network. `images` identifies those that it was trained on, if that is known; `recipe` is the
    recipe of its search for bits, `weights` a copy of its weights, because a search quantizes the network."""

    net: nn.Module
    spec: ModelSpec
    images: Record | None
    file: Path
    recipe: Recipe
    weights: Mapping[str, Tensor]

    def origin(self, splits: Splits) -> Record:
        """What measurements of the network depend on: spec, weights, images."""
        return {"model": model_to_dict(self.spec), "weights": digest(self.weights), "images": splits.source}


def load_network(args: argparse.Namespace) -> FloatNetwork:
    """The network that the flags name. UserError where there are no weights."""
    net, spec, images, file = _load(args.model, args.weights)
    recipe = get_recipe(args.recipe or haq_recipe_of(spec, args.quantizer), spec)
    weights = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    return FloatNetwork(net=net, spec=spec, images=images, file=file, recipe=recipe, weights=weights)


def _load(model: str, weights: Path | None) -> tuple[nn.Module, ModelSpec, Record | None, Path]:
    """The network of a name or of the folder of an experiment, its spec, the identity of its images, its file."""
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
    if weights is None and not file.exists():
        file = installed_weights(model) or file
    if not file.exists():
        check_known(model)
        raise UserError(
            f"no weights at {file}: train them (train.py --model {model}){how_to_install(model)} or give a file with "
            "--weights"
        )
    return *load_model(file, model), file


def load_task(args: argparse.Namespace, network: FloatNetwork, config: BitSearch) -> Task:
    """The layers of the network and their costs, by the cost model that the flags name."""
    layers = layers_of_model(network.net, network.spec)
    cost_model = _cost_model_of(args, layers, config.quantity)
    named = network.net, network.spec, config.quantizer, config.quantity, cost_model
    return make_task(*named, is_pruned=config.is_pruned)


def _cost_model_of(args: argparse.Namespace, layers: list[ConvLayer], quantity: str) -> CostModel:
    """The cost model that the flags name. A --table in CSV form has costs measured for these layers."""
    if args.table is not None and args.table.suffix.lower() == ".csv":
        return load_measured(args.table, layer_names(layers), quantity)
    return cost_model_from_flags(args.config, args.table)


def load_images(args: argparse.Namespace, network: FloatNetwork) -> tuple[Splits, Path | None]:
    """The images that the flags or the network name, and their folder (None: no folder). This may take long."""
    data = image_folder(args.data, load_checkpoint(network.file).get("data"))
    outputs = names_of_outputs(network.images) if args.classes is None else read_class_names(args.classes)
    splits = load_splits(network.spec, data, network.recipe.color_jitter, outputs)
    check_classes(splits, network.images, network.file)
    return splits, data


def warn_of_no_limit(choices: BitChoices) -> None:
    """Say on stderr that a budget is not below the cost of the most bits, so that it limits nothing."""
    if choices.budget >= (most := choices.most()):
        what = f"the budget of {choices.budget:.6g} {choices.costs.unit}"
        print(f"warning: {what} limits nothing: the most bits need {most:.6g}", file=sys.stderr)


def costs_digest(task: Task) -> str:
    """The identity of the costs of a task."""
    return digest({"cells": torch.from_numpy(task.costs.cells)})


def settings_of(task: Task, config: BitSearch, data: Path | None) -> Record:
    """The settings that results of all searches for bits record: the folder of images, what pruning has left."""
    settings = recorded_folder(data)
    if config.is_pruned and QUANTIZERS[config.quantizer].weights_only:
        return {**settings, "weights_left": weights_left(task.net, layer_names(task.layers))}
    return settings
