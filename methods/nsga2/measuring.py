"""Measurement of points of a front: as they are in the supernet, or after a short finetune. It can be killed."""

from __future__ import annotations

import argparse
import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from apq.checkpoint import digest, trained_for
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.model_folder import ModelFolder
from apq.resume import Journal, difference
from apq.search_result import SearchResult
from apq.space import SearchSpace, space_to_dict
from dataset import check_classes, image_folder, load_splits, names_of_outputs, recorded_folder
from elastic_nn.networks.supernet_file import load_quantized_supernet, with_quantizers
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.distributed import by_first
from elastic_nn.training.recipe import adjusted
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution
from lut.population import PopulationCost
from methods.nsga2.front_finder import Front
from methods.nsga2.front_records import load_front, spread
from methods.search.evaluated import EvaluatedStore
from methods.search.measurement import Finetune, Measurement, measure
from methods.search.predicted import load_quantized_predictor

STEM = "measured.state"  # of the journal, which is there until the front has its values
MEASURED_BY = "measured_by"  # key of a search's settings: how points of its front were measured


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How to measure at most `most` points of a front. `data` is the folder of the images (None: no folder)."""

    measurement: Measurement
    most: int
    data: Path | None
    deterministic: bool = False

    @functools.cached_property
    def record(self) -> Record:
        """All that a measured accuracy depends on besides the subnet, as plain data."""
        measurement = self.measurement
        return {
            "supernet": digest(measurement.supernet.state_dict()),
            "quantizer": measurement.supernet.scheme.name,
            "images": measurement.splits.source,
            "recalibration_images": measurement.recalibration_images,
            "finetune": measurement.finetune and measurement.finetune.record(),
            **({"deterministic": True} if self.deterministic else {}),  # records of before have none
        }

    def differs(self, result: SearchResult) -> str:
        """Where the measurement of a front, if there was one, was another one; "" if nowhere."""
        before = result.settings.get(MEASURED_BY)
        return "" if before is None else difference(before, self.record)


def load_measuring(args: argparse.Namespace, origin: Experiment | None) -> Measuring:
    """What the flags and the search of a front (`origin`; None: that of the flags) say about the measurement.

    UserError where the supernet does not fit the predictor, or needs a finetune that is not asked for.
    """
    searched = None if origin is None else load_front(origin)[1]
    models = args.acc_predictor_dir if searched is None else searched.found_subnet.models
    file, device = ModelFolder(models).supernet, resolve_device(args.device)
    supernet, made = load_quantized_supernet(file, load_quantized_predictor(models).space)
    space, short = supernet.space, None
    recipe = get_recipe(args.recipe or made.recipe, space)
    if args.finetune_epochs:
        supernet = with_quantizers(supernet, scheme_named(recipe.quantizer))
        recipe = replace(recipe, pair_finetune=adjusted(recipe.pair_finetune, epochs=args.finetune_epochs))
        short = Finetune(recipe=recipe, seed=args.seed if searched is None else seed_of(searched))
    elif not supernet.scheme.trains_supernets:  # quantizers were added to a float supernet
        raise UserError(
            f"{file} is a float supernet, whose subnets need a finetune: give --measure with --finetune_epochs"
        )
    elif trained_for(ModelFolder(models).acc_quant) not in (None, digest(supernet.state_dict())):
        raise UserError(f"{file} is not the supernet that the predictor beside it was trained for")
    data = image_folder(args.data, searched and searched.settings.get("data"), made.data)
    # Last, because drawing or listing images may take long.
    splits = load_splits(space, data, recipe.color_jitter, names_of_outputs(made.images))
    check_classes(splits, made.images, file)
    measurement = Measurement(
        supernet=supernet.to(device),
        splits=splits,
        recalibration_images=recipe.recalibration_images,
        device=device,
        finetune=short,
    )
    return Measuring(measurement=measurement, most=args.measure, data=data, deterministic=args.deterministic)


def seed_of(searched: SearchResult) -> int:
    """The seed of finetunes of points of a front: that of those which were measured before, or that of its search."""
    before = searched.settings.get(MEASURED_BY)
    short = before.get("finetune") if isinstance(before, dict) else None
    return short["seed"] if short else searched.settings["nsga2"]["seed"]


def measured_front(
    measuring: Measuring, experiment: Experiment, front: Front, result: SearchResult, execution: Execution
) -> tuple[Front, SearchResult]:
    """The front with its points measured, and the result that records how. Each process measures its part.

    Points that have a value are not measured again. UserError if they were measured in another way.
    """
    if differs := measuring.differs(result):
        raise UserError(
            f"the front of {experiment.path} was measured in another way: {differs}; measure a copy of it instead: "
            f"--front {experiment.path} --exp_name OTHER"
        )
    space = result.found_subnet.space
    wanted = [i for i in spread(len(front.genes), measuring.most) if np.isnan(front.measured[i])]
    if wanted:
        genes = front.genes.astype(np.int64)
        asked = {"front": hashlib.sha256(genes.tobytes()).hexdigest(), "space": space_to_dict(space)}
        store = open_store(experiment, space, {**asked, **measuring.record}, execution.rank)
        by_first(lambda: None if store.started() else store.start(), execution)
        flops = PopulationCost(space, "flops").predict(genes)
        top1 = measure(measuring.measurement, store, "front", genes, flops, execution, wanted)
        front = replace(front, measured=np.where(np.isnan(top1), front.measured, top1))
    settings = {**result.settings, MEASURED_BY: measuring.record, **recorded_folder(measuring.data)}
    return front, replace(result, settings=settings)


def unmeasured(front: Front, result: SearchResult) -> tuple[Front, SearchResult]:
    """The front and its result as before any measurement."""
    settings = {key: value for key, value in result.settings.items() if key != MEASURED_BY}
    return replace(front, measured=np.full(len(front.genes), np.nan)), replace(result, settings=settings)


def open_store(experiment: Experiment, space: SearchSpace, made_by: Record, rank: int) -> EvaluatedStore:
    """The measured points on disk, to which the process of this rank appends."""
    return EvaluatedStore(space=space, journal=_journal(experiment, rank), made_by=made_by)


def remove_journal(experiment: Experiment) -> None:
    """Remove the journal, whose values are in the front now."""
    journal = _journal(experiment)
    for file in (journal.asked_file, *journal.files()):
        file.unlink(missing_ok=True)


def _journal(experiment: Experiment, rank: int = 0) -> Journal:
    remedy = f"remove {experiment.path}/{STEM}* to measure anew"
    return Journal(experiment.path / f"{STEM}.json", STEM, "measurement of a front", remedy, rank)


def how_measured(settings: Record) -> str:
    """How the points of a front were measured, in words."""
    short: Any = settings[MEASURED_BY]["finetune"]
    how = f"after a finetune of {short['train']['epochs']} epochs" if short else "as they are in the supernet"
    return f"{how}, on images held out of training"
