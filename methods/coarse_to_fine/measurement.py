"""Measuring subnets of a supernet as they are: what is measured is kept, what is missing shared by processes."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from apq.checkpoint import load_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.genes import subnets_of
from apq.subnet import Subnet
from dataset.splits import Splits, make_loader
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.training.distributed import check_agreement, wait
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.session import Execution
from methods.coarse_to_fine.evaluated import EvaluatedStore


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How a subnet is measured: cut out, BatchNorm recalibrated on so many training images, not trained."""

    supernet: DynamicQuantizedProxylessNASNets
    splits: Splits
    recalibration_images: int
    device: torch.device

    def network(self, subnet: Subnet) -> MBConvNet:
        """The subnet, ready to run."""
        return quantized_subnet(self.supernet, subnet, self.splits, self.recalibration_images, self.device)

    def top1(self, subnet: Subnet) -> float:
        """Its top-1 on the training images that were held out."""
        images = make_loader(self.splits.val, EVALUATION_BATCH, sides=(subnet.resolution,))
        return evaluate(self.network(subnet), images, self.device).top1


def open_store(experiment: Experiment, store: EvaluatedStore, asked: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether there are measurements to continue from; UserError if there is something that may not be replaced."""
    if overwrite:
        experiment.check_free(overwrite)
        with contextlib.suppress(UserError):
            return store.holds(asked) and store.readable()
        return False
    if not store.holds(asked):
        experiment.check_free(overwrite)
        return False
    best, last = experiment.best_checkpoint, experiment.last_checkpoint
    if last.exists() or (best.exists() and load_checkpoint(best).get("train", {}) is not None):
        raise UserError(f"{experiment.path} is finetuned; choose another --exp_name or give --overwrite")
    return True


def measure(
    measurement: Measurement,
    store: EvaluatedStore,
    stage: str,
    genes: np.ndarray,
    flops: np.ndarray,
    execution: Execution,
) -> np.ndarray:
    """(n,) top-1 of a stage's subnets, those that are missing measured now, each process its part."""
    space = measurement.supernet.space
    subnets = subnets_of(space, genes)
    done = store.load(space, stage, subnets)
    check_agreement(
        {
            "measured subnets (their folder must be shared)": sorted(done),
            f"{stage} subnets": hashlib.sha256(np.ascontiguousarray(genes).tobytes()).hexdigest(),
        },
        execution,
    )
    # Resolution by resolution: loaders with worker processes are kept for the last few sizes only.
    missing = sorted((i for i in range(len(subnets)) if i not in done), key=lambda i: subnets[i].resolution)
    missing = missing[execution.rank :: execution.world_size]
    for i in tqdm(missing, desc=stage, unit="subnet", disable=None if execution.main else True):
        store.append(space, stage, i, subnets[i], float(flops[i]), measurement.top1(subnets[i]))
    wait(execution)
    done = store.load(space, stage, subnets)
    return np.array([done[i] for i in range(len(subnets))])
