"""What a search that measures needs, loaded from its flags and checked before any work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from apq.bounds import is_whole
from apq.checkpoint import digest, load_checkpoint
from apq.cli import MOST_PAIRS
from apq.device import resolve_device
from apq.errors import UserError
from apq.files import Record, check_writable
from apq.model_folder import ModelFolder
from dataset import check_classes, image_folder, load_splits, names_of_outputs
from dataset.pairs import PairStore
from elastic_nn.networks.supernet_file import load_quantized_supernet, with_quantizers
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.pairs import origin_of_pairs
from elastic_nn.training.recipe import with_quantizer
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution
from methods.search.archive import Archive, drawn
from methods.search.measurement import Finetune, Measurement
from methods.search.refine import Refining
from methods.search.surrogate import Surrogate, config_of
from utils.predictor_files import Predictor, load_mlp


def check_flags(args: argparse.Namespace) -> None:
    """UserError for a number of measurements that does not fit the rounds of --refine."""
    if args.measure is None or not args.refine <= args.measure <= MOST_PAIRS:
        raise UserError(
            f"--refine {args.refine} needs --measure N, the number of subnets to measure in all: at least one a round, "
            f"at most {MOST_PAIRS}"
        )


def depends_on(refining: Refining, most: int) -> Record:
    """What a search that measures `most` subnets depends on besides the search itself, as plain data."""
    rounds = {"rounds": refining.rounds, "measure": most, "predictor": refining.surrogate.asked()}
    return {"refine": {**rounds, "measured_as": refining.archive.made_by}}


def warn_of_one_mlp(args: argparse.Namespace, predictor: Predictor) -> None:
    """Say on stderr that rounds do not use the predictor of the folder itself."""
    if not predictor.has_spread:
        print(
            f"{ModelFolder(args.acc_predictor_dir).acc_quant} is one MLP, which cannot say how uncertain it is: rounds "
            "use a kernel that is fitted to the same pairs",
            file=sys.stderr,
        )


def load_refining(args: argparse.Namespace, predictor: Predictor, execution: Execution, most: int) -> Refining:
    """The parts of a search that measures `most` subnets, as the pairs of its predictor were measured.

    UserError where the supernet, the pairs or the images of the predictor are missing or other ones. Images come last,
    because drawing or listing them may take long.
    """
    folder, device, space = ModelFolder(args.acc_predictor_dir), resolve_device(args.device), predictor.space
    data, settings = _facts_of(folder.acc_quant)
    store = PairStore(Path(data["pairs"]), execution.rank)
    pairs_made_by = store.made_by()
    supernet, made = load_quantized_supernet(folder.supernet, space)
    recipe = with_quantizer(get_recipe(args.recipe or made.recipe, space), pairs_made_by.get("quantizer"))
    splits = load_splits(space, image_folder(args.data, made.data), recipe.color_jitter, names_of_outputs(made.images))
    check_classes(splits, made.images, folder.supernet)
    weights, seed = digest(supernet.state_dict()), pairs_made_by.get("seed", 0)
    made_by = origin_of_pairs(supernet, weights, recipe, splits.source, seed)
    store.has(space, {**made_by, **drawn(pairs_made_by)})  # UserError where they were measured in another way
    genes, accuracies = store.load(space, data["n_pairs"])
    if (n := len(genes)) < data["n_pairs"]:
        raise UserError(f"{store.path} has {n} of the {data['n_pairs']} pairs of {folder.acc_quant}")
    as_is = supernet.scheme.trains_supernets
    surrogate = Surrogate(
        space=space,
        quantize=True,
        genes=genes,
        accuracies=accuracies,
        config=config_of(settings, seed),
        is_kernel=not predictor.has_spread or "kernel" in settings,
        initial=None if as_is else load_mlp(folder.acc, space),
        rule=recipe.pair_outliers,
    )
    check_writable(store.measured().path)
    archive = Archive(store=store.measured(), space=space, made_by=made_by)
    surrogate.check_room(len(archive.load()[0]) + most)
    return Refining(
        rounds=args.refine,
        most=most,
        measurement=Measurement(
            supernet=with_quantizers(supernet, scheme_named(recipe.quantizer)).to(device),
            splits=splits,
            recalibration_images=recipe.recalibration_images,
            device=device,
            finetune=None if as_is else Finetune(recipe=recipe, seed=seed),
        ),
        archive=archive,
        surrogate=surrogate,
        device=device,
    )


def _facts_of(file: Path) -> tuple[Record, Record]:
    """The record of the pairs of a predictor, and that of its training. UserError where it has none."""
    found = load_checkpoint(file)
    remedy = f"make one with search.py --prepare acc_quant --acc_predictor_dir {file.parent} --overwrite"
    data, settings = found.get("data"), found.get("predictor_training")
    if not (isinstance(data, Mapping) and isinstance(settings, Mapping) and {"pairs", "n_pairs"} <= set(data)):
        raise UserError(f"{file} does not say which pairs it was trained on, so it cannot learn from more: {remedy}")
    counts = data["n_pairs"], data.get("n_measured", 0)
    if not (isinstance(data["pairs"], str) and all(is_whole(n, 0, MOST_PAIRS) for n in counts)):
        raise UserError(f"{file} has a damaged record of its pairs: {remedy}")
    return dict(data), dict(settings)
