"""Measurement of subnets as they are in their supernet. Results are kept; processes share the missing subnets."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass

import numpy as np
import torch

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
from elastic_nn.training.progress import Progress
from elastic_nn.training.session import Execution
from methods.coarse_to_fine.evaluated import REMEDY, Evaluated, EvaluatedStore


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measures subnets: cut out of the supernet, recalibrated on `recalibration_images` training images, not
    trained."""

    supernet: DynamicQuantizedProxylessNASNets
    splits: Splits
    recalibration_images: int
    device: torch.device

    def network(self, subnet: Subnet) -> MBConvNet:
        """The subnet, ready to run."""
        return quantized_subnet(self.supernet, subnet, self.splits, self.recalibration_images, self.device)

    def top1(self, subnet: Subnet) -> float:
        """Top-1 of the subnet on the validation images."""
        images = make_loader(self.splits.val, EVALUATION_BATCH, sides=(subnet.resolution,))
        return evaluate(self.network(subnet), images, self.device).top1


def can_continue(experiment: Experiment, store: EvaluatedStore, *, overwrite: bool) -> bool:
    """Whether there are measurements to continue from. UserError if the folder holds anything else."""
    if overwrite:
        experiment.check_free(overwrite)
        with contextlib.suppress(UserError):
            return store.started() and all(True for _ in store.journal.records())  # reads every line
        return False
    if not store.started():
        experiment.check_free(overwrite)
        return False
    best, last = experiment.best_checkpoint, experiment.last_checkpoint
    if last.exists() or (best.exists() and load_checkpoint(best).get("train", {}) is not None):
        raise UserError(f"{experiment.path} is finetuned; {REMEDY}")
    return True


def measure(
    measurement: Measurement,
    store: EvaluatedStore,
    stage: str,
    genes: np.ndarray,
    flops: np.ndarray,
    execution: Execution,
) -> np.ndarray:
    """(n,) top-1 of the subnets `genes` (n, genes) of a stage.

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
    # By resolution, because loaders with worker processes are kept for the latest few resolutions only.
    missing = sorted((i for i in range(len(subnets)) if i not in done), key=lambda i: subnets[i].resolution)
    missing = missing[execution.rank :: execution.world_size]
    before = len(done) // execution.world_size
    total = before + len(missing)
    for i in Progress(missing, f"{stage} stage", total, done=before, unit="subnet", shown=execution.main):
        top1 = measurement.top1(subnets[i])
        store.append(Evaluated(stage=stage, index=i, subnet=subnets[i], flops=int(flops[i]), top1=top1))
    wait(execution)
    done = store.load(stage, subnets)
    return np.array([done[i] for i in range(len(subnets))])
