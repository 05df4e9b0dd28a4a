"""One way to train and one way to evaluate: every recipe is built on these two."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from apq.errors import UserError
from dataset.splits import ALONE
from elastic_nn.modules.quant_layers import learned_parameters, part_of_batch, shared_batch
from elastic_nn.training.distributed import sum_over
from elastic_nn.training.recipe import TrainConfig

EVALUATION_BATCH = 256


class DivergedError(UserError):
    """A network whose loss is no longer a number."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 as shares (0 to 1), mean cross-entropy, number of images."""

    top1: float
    top5: float
    loss: float
    n_images: int


def seed_epoch(seed: int, epoch: int) -> None:
    """Make an epoch's shuffling and augmentation depend on the seed and its number alone: a resumed run repeats it."""
    torch.manual_seed(derived_seed(seed, epoch))


def derived_seed(*key: int) -> int:
    """One seed from several numbers, hashed so that neighbouring keys have nothing in common."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD in three named groups: decayed weights; what has no reason to shrink; quantizer ranges, steps and offsets.

    Norms, biases and kernel transforms, which start as the identity, are not decayed, nor are ranges and steps: a
    smaller one is no simpler. These have a group of their own because their gradients, sums over all that they clip or
    round, are clipped apart: together with the weights' they would eat up the norm that clipping leaves.
    """
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "free": [], "ranges": []}
    ranges = {id(parameter) for parameter in learned_parameters(net)}
    for name, parameter in net.named_parameters():
        if id(parameter) in ranges:
            groups["ranges"].append(parameter)
        else:
            groups["free" if parameter.ndim < 2 or "kernel_transforms" in name else "decayed"].append(parameter)
    decay = {"decayed": config.weight_decay, "free": 0.0, "ranges": 0.0}
    return torch.optim.SGD(
        [{"name": name, "params": params, "weight_decay": decay[name]} for name, params in groups.items()],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=True,
    )


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """Cosine from `lr` to 0, after a linear warm-up; `epoch` counts parts of epochs."""
    if epoch < config.warmup_epochs:
        return config.lr * (epoch + 1e-3) / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return 0.5 * config.lr * (1 + math.cos(math.pi * min(done, 1.0)))


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy against the teacher's softened labels (temperature 1)."""
    return F.cross_entropy(logits, teacher_logits.softmax(1))


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the steps of a training are carried out.

    `amp` computes in bfloat16 where that is safe; `accumulate` cuts a batch into so many parts, which need less memory
    (BatchNorm and BatchQuant then take each part by itself). `share` is (rank, number) of the processes that share
    every batch.
    """

    amp: bool = False
    accumulate: int = 1
    share: tuple[int, int] = ALONE

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.share[0] == 0

    def asked(self) -> dict[str, Any]:
        """What of it a continued training must repeat; the number of processes may change."""
        return {"amp": self.amp, "accumulate": self.accumulate}

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that forward passes run in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.amp)


ONE_PROCESS = Execution()


class _Step(nn.Module):
    """Several subnets in one forward pass, which is how DistributedDataParallel wants to see them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, subnets: Iterable[Callable[[], None]]) -> list[Tensor]:
        logits = []
        for activate in subnets:
            activate()
            logits.append(self.net(images))
        return logits


def train_one_epoch(
    net: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    epoch: int,
    *,
    device: torch.device,
    teacher: nn.Module | None = None,
    choose: Callable[[], Sequence[Callable[[], None]]] = lambda: (lambda: None,),
    execution: Execution = ONE_PROCESS,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Train one epoch and return its mean loss. UserError if the loss stops being a number.

    A step draws its subnets by `choose`, whose calls each activate one, and adds up their gradients.

    Of several processes each has its share of every batch in `loader`; the weights stay the same in all of them.
    """
    net.train()
    share = execution.share
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    total, seen = torch.zeros((), dtype=torch.float64, device=device), 0  # on the device: no step waits for it

    def loss_of(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        logits = logits.float() if execution.amp else logits
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if teacher_logits is not None:
            loss = loss + config.kd_ratio * distillation_loss(logits, teacher_logits.to(logits.dtype))
        total.add_(loss.detach() * len(labels))
        return loss

    with shared_batch(net, share[1]):
        # Every process runs all subnets of a step in one pass; alone, one after the other needs less memory.
        parallel = _parallel(net) if share[1] > 1 else None
        for step, (images, labels) in enumerate(loader):
            rate = learning_rate(config, epoch + step / len(loader))
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, labels = to_device(images, device), labels.to(device, non_blocking=True)
            n_all = len(labels) if parallel is None else int(sum_over(torch.tensor(len(labels)).to(device), share))
            subnets = choose()
            optimizer.zero_grad(set_to_none=True)
            n_parts = max(1, min(execution.accumulate, n_all // share[1]))  # the same in all processes
            parts = list(zip(images.tensor_split(n_parts), labels.tensor_split(n_parts), strict=True))
            for i, (x, y) in enumerate(parts):
                weight = len(y) * share[1] / n_all  # DistributedDataParallel averages over processes
                with execution.autocast(device):
                    taught = None
                    if teacher is not None:
                        with torch.no_grad():
                            taught = teacher(x)
                if parallel is None:
                    for activate in subnets:
                        activate()
                        with execution.autocast(device), part_of_batch(net, len(y) / n_all):
                            logits = net(x)
                        (loss_of(logits, y, taught) * weight).backward()
                        seen += len(y)
                    continue
                with contextlib.nullcontext() if i + 1 == len(parts) else parallel.no_sync():
                    with execution.autocast(device), part_of_batch(net, len(y) / n_all):
                        outputs = parallel(x, subnets)
                    (sum(loss_of(logits, y, taught) for logits in outputs) * weight).backward()
                    seen += len(y) * len(outputs)
            nn.utils.clip_grad_norm_([*groups["decayed"], *groups["free"]], config.clip_norm)
            nn.utils.clip_grad_norm_(groups["ranges"], config.clip_norm)
            optimizer.step()
            after_step()
    sums = sum_over(torch.stack([total, torch.tensor(float(seen), dtype=torch.float64, device=device)]), share)
    if sums[1] == 0:
        raise UserError("nothing to train on: the split has fewer than two images for each process")
    mean = (sums[0] / sums[1]).item()
    if not math.isfinite(mean):
        raise DivergedError(
            f"training diverged: the loss of epoch {epoch + 1} is {mean}; lower the learning rate ({config.lr})"
        )
    return mean


def _parallel(net: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(_Step(net), find_unused_parameters=True)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Images where they are computed on; channels last on a GPU, whose convolutions are faster so."""
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=layout)


@torch.inference_mode()
def evaluate(
    net: nn.Module, loader: DataLoader, device: torch.device, *, execution: Execution = ONE_PROCESS
) -> Accuracy:
    """Accuracy of a network in evaluation mode; its training mode is restored afterwards.

    Of several processes each has its share of `loader`; all return the accuracy over all images. UserError where there
    are no images or the outputs are not numbers, of which an accuracy would mean nothing.
    """
    was_training = net.training
    net.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # hits in one, hits in five, loss, images
    for images, labels in loader:
        if not len(labels):  # a process's share of a short batch, or nothing that could be read
            continue
        images, labels = to_device(images, device), labels.to(device, non_blocking=True)
        with execution.autocast(device):
            logits = net(images)
        logits = logits.float() if execution.amp else logits
        hits = logits.topk(min(5, logits.size(1)), dim=1).indices == labels[:, None]  # (N, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        found = [hits[:, 0].sum(), hits.any(1).sum(), loss, torch.tensor(len(labels), device=device)]
        sums += torch.stack([value.double() for value in found])
    net.train(was_training)
    top1, top5, loss, n = sum_over(sums, execution.share).tolist()
    if n == 0:
        raise UserError("nothing to evaluate: the split has no images that can be read")
    if not math.isfinite(loss):
        raise DivergedError(
            f"the network's outputs are not finite (its loss is {loss}): its weights or ranges are damaged"
        )
    return Accuracy(top1=top1 / n, top5=top5 / n, loss=loss / n, n_images=int(n))
