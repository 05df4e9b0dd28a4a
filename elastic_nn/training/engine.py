"""Training steps and epochs, and evaluation, for all recipes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from apq.checkpoint import check_fit, check_optimizer
from apq.errors import UserError
from apq.resume import State
from apq.schema import fields, mapping, optional
from dataset.splits import LEAST_IMAGES, Batches, resize
from elastic_nn.modules.quant_layers import part_of_batch, shared_batch
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.training.distillation import TeacherOfBatch, distillation_loss
from elastic_nn.training.distributed import sum_over
from elastic_nn.training.optimizer import make_optimizer
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.session import ONE_PROCESS, Execution
from elastic_nn.training.tally import Tally

EVALUATION_BATCH = 256

# Makes a network run as one of its subnets; returns the resolution of its images (None: as they come).
Activate = Callable[[], int | None]
Choose = Callable[[], Sequence[Activate]]  # draws the subnets of a step


class DivergedError(UserError):
    """The loss of a network is not finite."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 as fractions (0 to 1), mean cross-entropy, number of images."""

    top1: float
    top5: float
    loss: float
    n_images: int


def seed_epoch(seed: int, epoch: int) -> None:
    """Make shuffling and augmentation depend on the seed and the epoch alone, so that a resumed run repeats them."""
    torch.manual_seed(derived_seed(seed, epoch))


def derived_seed(*key: int) -> int:
    """Hash several numbers into one seed, so that neighbouring keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """The schedule of `lr`, after a linear warm-up from `warmup_lr`. `epoch` has the fraction of the present epoch."""
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (epoch + 1e-3) / config.warmup_epochs
    if config.schedule != "cosine":
        return config.lr * (config.gamma if config.schedule == "exponential" else 1) ** int(
            epoch - config.warmup_epochs
        )
    done = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return 0.5 * config.lr * (1 + math.cos(math.pi * min(done, 1.0)))


class Training:
    """A network in training, with its new optimizer.

    With a `teacher`, its outputs are learned beside the labels: those for the images as they come or, if it `follows`,
    for the images as each subnet gets them. `average` is a moving average of the weights. A `tally`, if one is set,
    counts the right predictions of training steps.
    """

    def __init__(
        self,
        net: nn.Module,
        config: TrainConfig,
        device: torch.device,
        *,
        execution: Execution = ONE_PROCESS,
        teacher: nn.Module | None = None,
        teacher_follows: bool = False,
        average: AveragedModel | None = None,
    ) -> None:
        self.net, self.config, self.device, self.execution = net, config, device, execution
        self.teacher, self.teacher_follows = teacher, teacher_follows
        self.average, self.optimizer = average, make_optimizer(net, config)
        self.tally: Tally | None = None
        if isinstance(net, MBConvNet):
            net.dropout.p = config.dropout

    @property
    def result(self) -> nn.Module:
        """The trained network: the moving average, if there is one."""
        return self.net if self.average is None else self.average.module

    def state_dict(self) -> State:
        """All that training steps change: network, optimizer, moving average."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def check_state(self, state: Any) -> None:
        """UserError unless a training of the same network and settings can have saved the state."""
        fields(net=mapping, optimizer=mapping, average=optional(mapping))(state)
        check_fit(state["net"], self.net.state_dict())
        check_optimizer(state["optimizer"], self.optimizer)
        if (state["average"] is None) != (self.average is None):
            raise UserError("only one of it and the present training has a moving average")
        if self.average is not None:
            check_fit(state["average"], self.average.state_dict())

    def load_state_dict(self, state: State) -> None:
        """Continue from a saved state."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def train_one_epoch(training: Training, loader: Batches, epoch: int, choose: Choose = lambda: (lambda: None,)) -> float:
    """Train one epoch and return its mean loss. UserError if the loss is not finite.

    A step calls `choose` for its subnets and adds up their gradients. By default the network runs as it is. Each
    process has its part of every batch in `loader`; the weights stay equal in all processes.
    """
    training.net.train()
    with shared_batch(training.net, training.execution.world_size):
        steps = _Steps(training, choose)
        for i, (images, labels) in enumerate(loader):
            rate = learning_rate(training.config, epoch + i / len(loader))
            for group in training.optimizer.param_groups:
                group["lr"] = rate
            steps.step(images, labels)
    mean = steps.mean_loss()
    if not math.isfinite(mean):
        remedy = f"lower the learning rate ({training.config.lr})"
        raise DivergedError(f"training diverged: the loss of epoch {epoch + 1} is {mean}; {remedy}")
    return mean


class _Subnets(nn.Module):
    """Runs several subnets in one forward pass, as DistributedDataParallel needs it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, subnets: Iterable[Activate]) -> list[Tensor]:
        logits = []
        for activate in subnets:
            side = activate()
            logits.append(self.net(_at_side(images, side)))
        return logits


def _at_side(images: Tensor, side: int | None) -> Tensor:
    return images if side is None else resize(images, side)


class _Steps:
    """The steps of one epoch, and the sum of their losses."""

    def __init__(self, training: Training, choose: Choose) -> None:
        self.training, self.choose, self.execution, self.device = training, choose, training.execution, training.device
        # Several processes run all subnets of a step in one pass. One process runs them one by one, to save memory.
        several, net = self.execution.world_size > 1, _Subnets(training.net)
        self.parallel = DistributedDataParallel(net, find_unused_parameters=True) if several else None
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)  # on the device: no step waits for it
        self.n_seen = 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take one step on this process's part of a batch: (n, C, H, W) and (n,)."""
        images, labels = to_device(images, self.device), labels.to(self.device, non_blocking=True)
        n_all, world_size = len(labels), self.execution.world_size
        if self.parallel is not None:
            n_all = int(sum_over(torch.tensor(len(labels)).to(self.device), self.execution))
        subnets = self.choose()
        self.training.optimizer.zero_grad(set_to_none=True)
        n_parts = parts_of_batch(n_all, self.execution)
        parts = list(zip(images.tensor_split(n_parts), labels.tensor_split(n_parts), strict=True))
        for i, (x, y) in enumerate(parts):
            weight = len(y) * world_size / n_all  # DistributedDataParallel averages over processes
            with part_of_batch(self.training.net, len(y) / n_all):
                if self.parallel is None:
                    self._backward_each(x, y, subnets, weight)
                else:
                    with contextlib.nullcontext() if i + 1 == len(parts) else self.parallel.no_sync():
                        self._backward_together(x, y, subnets, weight)
        self._update()

    def mean_loss(self) -> float:
        """Mean loss over the images and subnets of all processes."""
        seen = torch.tensor(float(self.n_seen), dtype=torch.float64, device=self.device)
        total, seen = sum_over(torch.stack([self.total, seen]), self.execution).tolist()
        if seen == 0:
            raise UserError("nothing to train on: an epoch has fewer than two images for each process")
        return total / seen

    def _backward_each(self, x: Tensor, y: Tensor, subnets: Sequence[Activate], weight: float) -> None:
        teacher = self._teacher(x)
        for activate in subnets:
            images = _at_side(x, activate())
            with self.execution.autocast(self.device):
                logits = self.training.net(images)
            (self._loss(logits, y, teacher.logits(images)) * weight).backward()

    def _backward_together(self, x: Tensor, y: Tensor, subnets: Sequence[Activate], weight: float) -> None:
        teacher, sides = self._teacher(x), []
        with self.execution.autocast(self.device):
            outputs = self.parallel(x, [partial(_noting, activate, sides) for activate in subnets])
        losses = (
            self._loss(logits, y, teacher.logits(_at_side(x, side)))
            for logits, side in zip(outputs, sides, strict=True)
        )
        (sum(losses) * weight).backward()

    def _teacher(self, x: Tensor) -> TeacherOfBatch:
        def run(images: Tensor) -> Tensor:
            with self.execution.autocast(self.device):
                return self.training.teacher(images)

        known = None if self.training.teacher is None else run
        return TeacherOfBatch(known, x, follows=self.training.teacher_follows)

    def _loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        config = self.training.config
        logits = logits.float() if self.execution.amp else logits
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if teacher_logits is not None:
            loss = loss + config.kd_ratio * distillation_loss(logits, teacher_logits.to(logits.dtype))
        self.total.add_(loss.detach() * len(labels))
        self.n_seen += len(labels)
        if self.training.tally is not None:
            self.training.tally.add(logits, labels)
        return loss

    def _update(self) -> None:
        """Clip the gradients and update the weights."""
        config = self.training.config
        self.training.optimizer.clip_gradients(config.clip_norm, together=config.clip_together)
        self.training.optimizer.step()
        if (average := self.training.average) is not None:
            average.update_parameters(self.training.net)


def _noting(activate: Activate, sides: list[int | None]) -> int | None:
    """Activate a subnet and add its resolution to a list."""
    sides.append(activate())
    return sides[-1]


def parts_of_batch(n_images: int, execution: Execution) -> int:
    """Number of parts that each process cuts its images into, of a batch of `n_images` of all processes.

    It is `accumulate`, or fewer, so that BatchNorm has at least two images of each process in each part. It is the same
    in all processes.
    """
    return max(1, min(execution.accumulate, n_images // execution.world_size // LEAST_IMAGES))


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Move images to a device. On a GPU the layout is channels last, for faster convolutions."""
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=layout)


@torch.inference_mode()
def evaluate(net: nn.Module, loader: Batches, device: torch.device, *, execution: Execution = ONE_PROCESS) -> Accuracy:
    """Accuracy of a network in evaluation mode. Its training mode is restored afterwards.

    Each process has its part of every batch in `loader`, and returns the accuracy over all images. UserError if there
    are no images or if the outputs are not finite.
    """
    was_training = net.training
    net.eval()
    tally, loss = Tally(device), torch.zeros((), dtype=torch.float64, device=device)
    for images, labels in loader:
        if not len(labels):  # no part of a short batch, or no image that can be read
            continue
        images, labels = to_device(images, device), labels.to(device, non_blocking=True)
        with execution.autocast(device):
            logits = net(images)
        logits = logits.float() if execution.amp else logits
        tally.add(logits, labels)
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
    net.train(was_training)
    hits, n = tally.total(execution)
    loss = sum_over(loss, execution).item()
    if n == 0:
        raise UserError("nothing to evaluate: the split has no images that can be read")
    if not math.isfinite(loss):
        raise DivergedError(
            f"the network's outputs are not finite (its loss is {loss}): its weights or ranges are damaged"
        )
    return Accuracy(top1=hits.top1, top5=hits.top5, loss=loss / n, n_images=n)
