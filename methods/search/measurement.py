"""Measurement of subnets of a supernet, as they are or after a short finetune. Processes share the missing ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from apq.files import Record
from apq.genes import genes_of, subnets_of
from apq.subnet import Subnet
from dataset.splits import Splits, make_loader
from elastic_nn.modules.convolution import without_plans
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.training.distributed import check_agreement
from elastic_nn.training.engine import EVALUATION_BATCH, derived_seed, evaluate
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.pairs import short_finetune_top1
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.session import Execution, Session
from methods.search.evaluated import Evaluated, EvaluatedStore
from methods.search.sharing import do_missing


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """The short finetune before a measurement: `pair_finetune` of the recipe, on its `pair_epoch_images`."""

    recipe: Recipe
    seed: int

    def record(self) -> Record:
        """All that the finetuned weights depend on besides the supernet, as plain data."""
        train, images = asdict(self.recipe.pair_finetune), self.recipe.pair_epoch_images
        return {"train": train, "epoch_images": images, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measures subnets: cut out of the supernet, recalibrated on `recalibration_images` training images.

    They are not trained, unless there is a `finetune`.
    """

    supernet: DynamicQuantizedProxylessNASNets
    splits: Splits
    recalibration_images: int
    device: torch.device
    finetune: Finetune | None = None

    def network(self, subnet: Subnet) -> MBConvNet:
        """The subnet, ready to run, not finetuned."""
        return quantized_subnet(self.supernet, subnet, self.splits, self.recalibration_images, self.device)

    @without_plans()
    def top1(self, subnet: Subnet) -> float:
        """Top-1 of the subnet on the validation images. A finetune has a seed of its own for each subnet."""
        if (short := self.finetune) is not None:
            seed = derived_seed(short.seed, *genes_of(self.supernet.space, [subnet])[0].tolist())
            session = Session(splits=self.splits, device=self.device, seed=seed)
            return short_finetune_top1(self.supernet, subnet, session, short.recipe)
        images = make_loader(self.splits.val, EVALUATION_BATCH, sides=(subnet.resolution,), device=self.device)
        return evaluate(self.network(subnet), images, self.device).top1


def measure(
    measurement: Measurement,
    store: EvaluatedStore,
    stage: str,
    genes: np.ndarray,
    flops: np.ndarray,
    execution: Execution,
    wanted: Sequence[int] | None = None,
) -> np.ndarray:
    """(n,) top-1 of the subnets `genes` (n, genes) of a stage, or of the `wanted` rows alone: NaN for others.

    Subnets without a measurement are measured now, each process its part of them.
    """
    subnets = subnets_of(store.space, genes)
    done = store.load(stage, subnets)
    check_agreement(
        {
            "measured subnets (their folder must be shared)": sorted(done),
            f"{stage} subnets": hashlib.sha256(np.ascontiguousarray(genes).tobytes()).hexdigest(),
        },
        execution,
    )
    rows = range(len(subnets)) if wanted is None else wanted

    def measure_one(i: int) -> None:
        top1 = measurement.top1(subnets[i])
        store.append(Evaluated(stage=stage, index=i, subnet=subnets[i], flops=int(flops[i]), top1=top1))

    do_missing(rows, done, measure_one, execution, what=f"{stage} stage", unit="subnet")
    done = store.load(stage, subnets)
    top1 = np.full(len(subnets), np.nan)
    top1[list(rows)] = [done[i] for i in rows]
    return top1
