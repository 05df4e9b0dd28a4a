"""Gather <subnet, accuracy> pairs from a trained supernet. Pair i depends on the seed and i alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm

from apq.genes import sample, subnets_of, with_highest_bits
from apq.space import SearchSpace
from apq.subnet import Subnet
from dataset.pairs import PairStore
from dataset.splits import Splits, make_loader
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.quantizers import FLOAT
from elastic_nn.training.engine import EVALUATION_BATCH, derived_seed, evaluate, seed_epoch
from elastic_nn.training.finetune import quantized_subnet, train_epochs
from elastic_nn.training.measuring import subnet_top1
from elastic_nn.training.recipe import Recipe

LOG_SECONDS = 60


def pair_subnet(space: SearchSpace, seed: int, index: int, *, quantized: bool) -> Subnet:
    """The subnet of pair `index`; a float pair has no policy, its bits are the highest."""
    genes = sample(space, 1, np.random.default_rng([seed, index, int(quantized)]))
    return subnets_of(space, genes if quantized else with_highest_bits(space, genes))[0]


def gather_as_is(
    supernet: DynamicProxylessNASNets,
    splits: Splits,
    recipe: Recipe,
    store: PairStore,
    indices: Sequence[int],
    seed: int,
    device: torch.device,
) -> None:
    """Append the pairs of these indices: subnets as they are in the supernet, recalibrated and evaluated.

    Those of a float supernet have no policy; those of one that was trained quantized need no finetune.
    """
    quantized = supernet.scheme != FLOAT
    for index in _with_pace(indices, f"{'quantized' if quantized else 'float'} pairs", store.rank):
        subnet = pair_subnet(supernet.space, seed, index, quantized=quantized)
        top1 = subnet_top1(supernet, subnet, splits, splits.val, recipe.recalibration_images, device)
        store.append(supernet.space, index, subnet, top1)


def gather_finetuned(
    supernet: DynamicQuantizedProxylessNASNets,
    splits: Splits,
    recipe: Recipe,
    store: PairStore,
    indices: Sequence[int],
    seed: int,
    device: torch.device,
) -> None:
    """Append the pairs of these indices: random architectures with random policies, each after a short finetune."""
    for index in _with_pace(indices, "quantized pairs", store.rank):
        subnet = pair_subnet(supernet.space, seed, index, quantized=True)
        top1 = short_finetune_top1(supernet, subnet, splits, recipe, derived_seed(seed, index), device)
        store.append(supernet.space, index, subnet, top1)


def short_finetune_top1(
    supernet: DynamicQuantizedProxylessNASNets,
    subnet: Subnet,
    splits: Splits,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> float:
    """Validation top-1 after the recipe's short finetune: its end, not its best epoch, which would flatter noise."""
    seed_epoch(seed, 0)
    net = quantized_subnet(supernet, subnet, splits, recipe.recalibration_images, device)
    config, side = recipe.pair_finetune, subnet.resolution
    train_epochs(net, splits, config, seed=seed, device=device, side=side, n_images=recipe.pair_epoch_images)
    return evaluate(net, make_loader(splits.val, EVALUATION_BATCH, sides=(side,)), device).top1


def _with_pace(indices: Sequence[int], what: str, rank: int) -> Iterator[int]:
    """The indices, with a progress bar on a terminal and now and then a line in a log, from the first process alone."""
    started = said = time.monotonic()
    for done, index in enumerate(tqdm(indices, desc=what, unit="subnet", disable=None if rank == 0 else True)):
        now = time.monotonic()
        if rank == 0 and done and now - said > LOG_SECONDS and not sys.stderr.isatty():
            pace, said = done / (now - started), now
            left = (len(indices) - done) / pace
            print(
                f"{what}: {done} of {len(indices)} here, {60 * pace:.1f} a minute, {left / 60:.0f} minutes left",
                file=sys.stderr,
            )
        yield index
