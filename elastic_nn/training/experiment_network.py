"""The network of an experiment with its images, as it is measured, exported and reported."""

from __future__ import annotations

from pathlib import Path

import torch

from apq.checkpoint import digest, load_checkpoint, trained_for
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.model_folder import ModelFolder
from apq.search_result import read_result
from dataset import check_classes, image_folder, load_splits, names_of_outputs
from dataset.splits import ImageSpec, Splits
from elastic_nn.networks.subnet_file import FinetunedSubnet, load_finetuned
from elastic_nn.training.found_subnet import FoundSubnet, load_found


def load_subnet_and_images(
    experiment: Experiment, supernet: Path | None, data: Path | None, device: torch.device
) -> tuple[FinetunedSubnet, Splits]:
    """The network in the checkpoint, or else the subnet cut out of the supernet and calibrated; and the images.

    `supernet` is the file of another supernet than the recorded one, `data` another folder of images.
    """
    if experiment.best_checkpoint.exists():
        if supernet is not None:
            raise UserError(f"{experiment.best_checkpoint} has the network's weights: leave --supernet out")
        finetuned = load_finetuned(experiment)
        return finetuned, load_images(experiment, finetuned.space, finetuned.images, data)
    found = load_found(experiment, supernet=supernet, data=data, finetuned=False)
    if supernet is None:
        check_supernet(experiment, found)
    return FinetunedSubnet(found.network(device), found.space, found.subnet, found.splits.source), found.splits


def load_images(experiment: Experiment, spec: ImageSpec, images: Record | None, data: Path | None) -> Splits:
    """Load the images, from the folder of the finetune unless another is given.

    UserError if their classes are not those of the checkpoint.
    """
    recorded = load_checkpoint(experiment.best_checkpoint).get("data")
    splits = load_splits(spec, image_folder(data, recorded), outputs=names_of_outputs(images))
    check_classes(splits, images, experiment.best_checkpoint)
    return splits


def check_no_supernet(experiment: Experiment, supernet: Path | None) -> None:
    """UserError if a supernet is given for an experiment of a given network."""
    if supernet is not None:
        raise UserError(f"{experiment.path} has its own network: leave --supernet out")


def check_supernet(experiment: Experiment, found: FoundSubnet) -> None:
    """UserError if the supernet is not the one that the predictor of the search was trained for."""
    predictor = ModelFolder(read_result(experiment).found_subnet.models).acc_quant
    expected = trained_for(predictor)
    if expected is not None and expected != digest(found.supernet.state_dict()):
        raise UserError(f"{found.file} is not the supernet that {predictor} was trained for: give that with --supernet")
