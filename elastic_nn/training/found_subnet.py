"""The subnet of an experiment as it is in its supernet: cut out and calibrated, before any finetune."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from apq.errors import UserError
from apq.experiment import Experiment
from apq.model_folder import ModelFolder
from apq.search_result import read_result
from apq.space import SearchSpace
from apq.subnet import Subnet
from dataset import check_classes, load_splits
from dataset.splits import Splits
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.supernet_file import load_quantized_supernet
from elastic_nn.quantizers import LINEAR
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe


@dataclass(frozen=True, kw_only=True)
class FoundSubnet:
    """A subnet, the supernet that it is part of and that one's file, images and recipe."""

    space: SearchSpace
    subnet: Subnet
    supernet: DynamicQuantizedProxylessNASNets
    file: Path
    splits: Splits
    recipe: Recipe

    def network(self, device: torch.device) -> MBConvNet:
        """The subnet by itself, its quantizers and BatchNorm calibrated."""
        supernet = self.supernet.to(device)
        return quantized_subnet(supernet, self.subnet, self.splits, self.recipe.recalibration_images, device)


def load_found(
    experiment: Experiment,
    *,
    supernet: Path | None = None,
    data: Path | None = None,
    recipe: str | None = None,
    finetuned: bool = True,
) -> FoundSubnet:
    """The subnet of an experiment, with its supernet: the file `supernet`, or else the one in its folder of models.

    `data` is the image folder, for spaces that need one. `recipe` is a name; the default is the supernet's recipe.
    UserError where they do not fit together, or where the subnet will not be `finetuned` and the supernet is in float.
    """
    choice = read_result(experiment).found_subnet
    space = choice.space
    if supernet is not None and supernet.is_dir():
        supernet = ModelFolder(supernet).supernet
    file = supernet or ModelFolder(choice.models).supernet
    net, origin = load_quantized_supernet(file, space)
    if not finetuned and net.scheme == LINEAR:  # added to a float supernet
        raise UserError(
            f"{experiment.path} has no checkpoint, and {file} is a float supernet, whose subnets are nothing before a "
            "finetune: run quant_aware.py first"
        )
    chosen, splits = get_recipe(recipe or origin.recipe, space), load_splits(space, data)
    check_classes(splits, origin.images, file)
    return FoundSubnet(space=space, subnet=choice.subnet, supernet=net, file=file, splits=splits, recipe=chosen)
