"""<subnet, accuracy> pairs of a trained supernet: measurement of one subnet, and of many.

Pair i depends on the seed and on i alone. Each process measures its own pairs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from torch.utils.data import Dataset

from apq.files import Record
from apq.genes import sample, subnets_of, with_highest_bits
from apq.space import SearchSpace
from apq.strata import PairStrata, draw_in_strata
from apq.subnet import Subnet
from dataset.pairs import PairStore
from elastic_nn.modules.convolution import without_plans
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.supernet_file import with_quantizers
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.batchnorm import recalibrate, recalibration_batches
from elastic_nn.training.engine import EVALUATION_BATCH, derived_seed, evaluate, seed_epoch
from elastic_nn.training.finetune import quantized_subnet, train_epochs
from elastic_nn.training.progress import Progress
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.session import Session


def pair_subnet(
    space: SearchSpace, seed: int, index: int, *, quantized: bool, strata: PairStrata | None = None
) -> Subnet:
    """The subnet of pair `index`, by uniform choices or drawn in strata. That of a float pair has the highest bits."""
    rng = np.random.default_rng([seed, index, int(quantized)])
    genes = sample(space, 1, rng) if strata is None else draw_in_strata(space, 1, strata, rng)[0]
    return subnets_of(space, genes if quantized else with_highest_bits(space, genes))[0]


def origin_of_pairs(
    supernet: DynamicProxylessNASNets, weights: str, recipe: Recipe, images: Record, seed: int
) -> Record:
    """All that a measured pair depends on besides the subnet and how it was drawn, as plain data.

    `weights` is the digest of the supernet's. Subnets of a float supernet to which quantizers were added have a short
    finetune; others are measured as they are.
    """
    made_by: Record = {
        "seed": seed,
        "recalibration_images": recipe.recalibration_images,
        "supernet": weights,
        "images": images,
    }
    if not supernet.scheme.trains_supernets:
        made_by["finetune"] = asdict(recipe.pair_finetune)
        made_by["quantizer"] = recipe.quantizer
        if recipe.pair_epoch_images is not None:
            made_by["epoch_images"] = recipe.pair_epoch_images
    return made_by


@without_plans()
def subnet_top1(
    supernet: DynamicProxylessNASNets, subnet: Subnet, session: Session, images: Dataset, recalibration_images: int
) -> float:
    """Top-1 (0 to 1) on `images` of a subnet that is cut out and recalibrated on training images, not trained.

    The quantizers of the supernet must have their ranges or steps.
    """
    supernet.activate(subnet)
    net, sides = supernet.get_active_subnet(), (subnet.resolution,)
    calibration = recalibration_batches(session.splits, sides, session.device, recalibration_images)
    recalibrate(net, calibration, session.device, recalibration_images)
    loader = session.loader(images, EVALUATION_BATCH, sides=sides)
    return evaluate(net, loader, session.device, execution=session.execution).top1


@without_plans()
def short_finetune_top1(
    supernet: DynamicQuantizedProxylessNASNets, subnet: Subnet, session: Session, recipe: Recipe
) -> float:
    """Validation top-1 at the end of the recipe's short finetune. The best epoch would be biased by noise."""
    seed_epoch(session.seed, 0)
    net = quantized_subnet(supernet, subnet, session.splits, recipe.recalibration_images, session.device)
    side = subnet.resolution
    train_epochs(net, session, recipe.pair_finetune, side=side, n_images=recipe.pair_epoch_images)
    val = session.loader(session.splits.val, EVALUATION_BATCH, sides=(side,))
    return evaluate(net, val, session.device, execution=session.execution).top1


def gather_as_is(
    supernet: DynamicProxylessNASNets,
    session: Session,
    recipe: Recipe,
    store: PairStore,
    indices: Sequence[int],
    done: int = 0,
) -> None:
    """Append the pairs of these indices: subnets as they are in the supernet, recalibrated, not finetuned.

    Those of a float supernet have no policy. Progress starts at the `done` pairs of earlier runs.
    """
    quantized, alone = supernet.scheme.quantizes, session.alone()
    strata = recipe.pair_strata if quantized else None
    for index in _progress(indices, f"{'quantized' if quantized else 'float'} pairs", store, done):
        subnet = pair_subnet(supernet.space, session.seed, index, quantized=quantized, strata=strata)
        top1 = subnet_top1(supernet, subnet, alone, session.splits.val, recipe.recalibration_images)
        store.append(supernet.space, index, subnet, top1)


def gather_finetuned(
    supernet: DynamicQuantizedProxylessNASNets,
    session: Session,
    recipe: Recipe,
    store: PairStore,
    indices: Sequence[int],
    done: int = 0,
) -> None:
    """Append the pairs of these indices: random architectures with random policies, each after a short finetune.

    They have the quantizers of the recipe. Progress starts at the `done` pairs of earlier runs.
    """
    supernet = with_quantizers(supernet, scheme_named(recipe.quantizer))
    for index in _progress(indices, "quantized pairs", store, done):
        subnet = pair_subnet(supernet.space, session.seed, index, quantized=True, strata=recipe.pair_strata)
        own = session.alone(seed=derived_seed(session.seed, index))
        store.append(supernet.space, index, subnet, short_finetune_top1(supernet, subnet, own, recipe))


def _progress(indices: Sequence[int], what: str, store: PairStore, done: int) -> Progress:
    return Progress(indices, what, done + len(indices), done=done, unit="subnet", shown=store.rank == 0)
