"""What `search.py --prepare` is asked to do, checked against flags and files before any work."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from apq.errors import UserError
from apq.files import check_writable
from apq.model_folder import ModelFolder
from apq.space import SearchSpace
from apq.strata import PairStrata
from dataset import check_classes, image_folder, load_splits, names_of_outputs
from dataset.pairs import NETINFO, PairStore
from dataset.splits import Splits
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet
from elastic_nn.training.recipe import Recipe, with_quantizer
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Execution
from lut.cost_model import cost_model_from_flags
from lut.costs import why_not_priced
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_files import load_mlp
from utils.predictor_training import FEWEST_PAIRS, check_members


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A predictor to train, and the pairs that it needs.

    Attributes:
        folder, kind: folder of the supernet and the predictors, and "acc" or "acc_quant".
        supernet, recipe, splits: where, how and on which images pairs are measured.
        initial: the predictor to start from; None for pairs that are not finetuned, which are many.
        n_pairs, store: the number of pairs, and where they are kept.
        members: MLPs of the predictor; 0 for a kernel.
    """

    folder: ModelFolder
    kind: str
    supernet: DynamicProxylessNASNets
    recipe: Recipe
    splits: Splits
    initial: AccuracyPredictor | None
    n_pairs: int
    store: PairStore
    members: int = 1

    @property
    def space(self) -> SearchSpace:
        return self.supernet.space

    @property
    def quantized(self) -> bool:
        return self.kind == "acc_quant"

    @property
    def target(self) -> Path:
        """The file of the predictor."""
        return self.folder.predictor(self.kind)

    @property
    def as_is(self) -> bool:
        """Whether subnets are measured as they are: unless quantizers were added to a float supernet."""
        return self.supernet.scheme.trains_supernets


def check(args: argparse.Namespace, execution: Execution) -> Preparation:
    """All that the flags name, loaded and checked. UserError where parts are missing or do not fit together.

    The images come last, because drawing or listing them may take long.
    """
    folder, quantized = ModelFolder(args.acc_predictor_dir), args.prepare == "acc_quant"
    if args.acc_train_sample is not None and args.acc_train_sample < FEWEST_PAIRS:
        raise UserError(f"--acc_train_sample {args.acc_train_sample}: a predictor needs at least {FEWEST_PAIRS} pairs")
    target = folder.predictor(args.prepare)
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists; give --overwrite to train it anew (existing pairs are kept)")
    supernet, origin = (load_quantized_supernet if quantized else load_supernet)(folder.supernet)
    space = supernet.space
    if supernet.scheme.quantizes and not quantized:
        raise UserError(f"{folder.supernet} was trained quantized: gather its pairs with --prepare acc_quant")
    recipe = with_pairs(get_recipe(args.recipe or origin.recipe, space), args.pairs, quantized=quantized)
    store = PairStore((args.netinfo or NETINFO / space.name) / args.prepare, execution.rank)
    recipe = with_quantizer(recipe, args.quantizer or store.quantizer())
    n_pairs = number_of_pairs(args, recipe)
    initial = None if supernet.scheme.trains_supernets else load_mlp(folder.acc, space)
    members = number_of_members(args, recipe, initial)
    check_writable(folder.path)
    check_writable(store.path)
    if execution.main:
        warn_of_prices(space)
    data, outputs = image_folder(args.data, origin.data), names_of_outputs(origin.images)
    splits = load_splits(space, data, recipe.color_jitter, outputs)
    check_classes(splits, origin.images, folder.supernet)
    return Preparation(
        folder=folder,
        kind=args.prepare,
        supernet=supernet,
        recipe=recipe,
        splits=splits,
        initial=initial,
        n_pairs=n_pairs,
        store=store,
        members=members,
    )


def warn_of_prices(space: SearchSpace) -> None:
    """Say on stderr that the default cost model cannot price the space: a search will need another one."""
    if problem := why_not_priced(space, cost_model_from_flags(None, None)):
        print(f"warning: {problem}; searches of this space will need --config or --table", file=sys.stderr)


def with_pairs(recipe: Recipe, pairs: str | None, *, quantized: bool) -> Recipe:
    """The recipe with the pairs of --pairs: "uniform", or "stratified", by QFA's chances where it has no own.

    None leaves it as it is. UserError for float pairs, which are uniform.
    """
    if pairs is not None and not quantized:
        raise UserError("--pairs belongs to --prepare acc_quant: float pairs are drawn uniformly")
    if pairs is None or (pairs == "stratified" and recipe.pair_strata is not None):
        return recipe
    return replace(recipe, pair_strata=None if pairs == "uniform" else PairStrata())


def number_of_members(args: argparse.Namespace, recipe: Recipe, initial: AccuracyPredictor | None) -> int:
    """The number of MLPs of the predictor: that of the flag, or of `initial`, or one; 0 for a kernel.

    Without a flag, the recipe says which quantized pairs have a kernel. UserError for a kernel of float pairs or of
    members, and for members that `initial` does not fit.
    """
    by_recipe = recipe.predictor if args.prepare == "acc_quant" and args.members is None else None
    if (args.predictor or by_recipe) == "kernel":
        if args.members is not None or args.prepare == "acc":
            raise UserError("--predictor kernel has no --members, and belongs to --prepare acc_quant")
        return 0
    members = args.members or (initial.members if initial else 1)
    check_members(initial, members)
    return members


def number_of_pairs(args: argparse.Namespace, recipe: Recipe) -> int:
    """The number of pairs to gather: that of the flag, or else of the recipe."""
    if args.acc_train_sample is not None:
        return args.acc_train_sample
    return recipe.pairs_quant if args.prepare == "acc_quant" else recipe.pairs_float
