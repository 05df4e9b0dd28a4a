"""The subnet of an experiment, cut out of its supernet and calibrated, before a finetune."""

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
from dataset import check_classes, image_folder, load_splits, names_of_outputs
from dataset.splits import Splits
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.supernet_file import load_quantized_supernet, with_quantizers
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.recipe import Recipe, with_quantizer
from elastic_nn.training.recipes import get_recipe


@dataclass(frozen=True, kw_only=True)
class FoundSubnet:
    """A subnet and its supernet, with the supernet's file, images, their folder (None: no folder) and recipe."""

    space: SearchSpace
    subnet: Subnet
    supernet: DynamicQuantizedProxylessNASNets
    file: Path
    splits: Splits
    recipe: Recipe
    data: Path | None

    def network(self, device: torch.device) -> MBConvNet:
        """The subnet as a network of its own, calibrated."""
        supernet = self.supernet.to(device)
        return quantized_subnet(supernet, self.subnet, self.splits, self.recipe.recalibration_images, device)


def load_found(
    experiment: Experiment,
    *,
    supernet: Path | None = None,
    data: Path | None = None,
    recipe: str | None = None,
    quantizer: str | None = None,
    finetuned: bool = True,
) -> FoundSubnet:
    """Load the subnet of an experiment with its supernet.

    UserError where the parts do not fit together, or where the supernet is float and the subnet will not be finetuned.

    Args:
        supernet: file of the supernet (default: the one in the folder of models).
        data: image folder, for spaces that need one (default: the one that the search or the supernet recorded).
        recipe: name of a recipe (default: the supernet's).
        quantizer: name of the quantizers of a float supernet's subnets (default: those of the recipe).
        finetuned: whether the subnet will be finetuned.
    """
    result = read_result(experiment)
    choice = result.found_subnet
    space = choice.space
    if supernet is not None and supernet.is_dir():
        supernet = ModelFolder(supernet).supernet
    file = supernet or ModelFolder(choice.models).supernet
    net, origin = load_quantized_supernet(file, space)
    if not (finetuned or net.scheme.trains_supernets):  # quantizers were added to a float supernet
        raise UserError(
            f"{experiment.path} has no checkpoint, and {file} is a float supernet, whose subnets need a finetune: "
            "run quant_aware.py first"
        )
    if quantizer is not None and net.scheme.trains_supernets:
        raise UserError(f"{file} was trained with {net.scheme.name} quantizers, which its subnets keep: no --quantizer")
    chosen = with_quantizer(get_recipe(recipe or origin.recipe, space), quantizer)
    data = image_folder(data, result.settings.get("data"), origin.data)
    splits = load_splits(space, data, chosen.color_jitter, names_of_outputs(origin.images))
    check_classes(splits, origin.images, file)
    net = with_quantizers(net, scheme_named(chosen.quantizer))
    parts = {"supernet": net, "file": file, "splits": splits, "recipe": chosen, "data": data}
    return FoundSubnet(space=space, subnet=choice.subnet, **parts)
