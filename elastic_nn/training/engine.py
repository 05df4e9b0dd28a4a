"""One way to train and one way to evaluate: every recipe is built on these two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apq.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: SGD with Nesterov momentum, one cosine from `lr` to 0 over all epochs.

    `kd_ratio` weighs the distillation loss against the labels' (1 is both equally); it needs a teacher.
    """

    epochs: int
    lr: float
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    kd_ratio: float = 1.0
    clip_norm: float = 5.0
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.lr > 0:
            raise UserError(f"training needs epochs >= 1, batch size >= 2, learning rate > 0, not {self}")


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
    """SGD in three named groups: decayed weights; what has no reason to shrink; quantizer ranges.

    Norms, biases and kernel transforms, which start as the identity, are not decayed. Ranges have a group of their own
    because their gradients, sums over all activations that they clip, are clipped apart: together with the weights'
    they would eat up the norm that clipping leaves.
    """
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "free": [], "ranges": []}
    for name, parameter in net.named_parameters():
        if name.endswith(".range"):
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


def train_one_epoch(
    net: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    epoch: int,
    *,
    device: torch.device,
    teacher: nn.Module | None = None,
    choose: Iterable[Callable[[], None]] = (lambda: None,),
) -> float:
    """Train one epoch and return its mean loss. A step runs every call of `choose` (each picks a subnet) and adds up
    the gradients. UserError if the loss stops being a number."""
    net.train()
    total, seen = torch.zeros((), dtype=torch.float64, device=device), 0  # on the device: no step waits for it
    for step, (images, labels) in enumerate(loader):
        rate = learning_rate(config, epoch + step / len(loader))
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = teacher(images)
        optimizer.zero_grad(set_to_none=True)
        for pick in choose:
            pick()
            logits = net(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            if teacher is not None:
                loss = loss + config.kd_ratio * distillation_loss(logits, teacher_logits)
            loss.backward()
            total += loss.detach() * len(labels)
            seen += len(labels)
        groups = {group["name"]: group["params"] for group in optimizer.param_groups}
        nn.utils.clip_grad_norm_([*groups["decayed"], *groups["free"]], config.clip_norm)
        nn.utils.clip_grad_norm_(groups["ranges"], config.clip_norm)
        optimizer.step()
    if seen == 0:
        raise UserError("nothing to train on: the split has fewer than two images")
    mean = total.item() / seen
    if not math.isfinite(mean):
        raise UserError(
            f"training diverged: the loss of epoch {epoch + 1} is {mean}; lower the learning rate ({config.lr})"
        )
    return mean


@torch.inference_mode()
def evaluate(net: nn.Module, loader: DataLoader, device: torch.device) -> Accuracy:
    """Accuracy of a network in evaluation mode; its training mode is restored afterwards.

    UserError where there are no images or the outputs are not numbers, of which an accuracy would mean nothing.
    """
    was_training = net.training
    net.eval()
    top1 = top5 = n = 0
    loss = 0.0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = net(images)
        ranked = logits.topk(min(5, logits.size(1)), dim=1).indices  # (N, 5)
        hits = ranked == labels[:, None]
        top1 += hits[:, 0].sum().item()
        top5 += hits.any(1).sum().item()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        n += len(labels)
    net.train(was_training)
    if n == 0:
        raise UserError("nothing to evaluate: the split has no images")
    if not math.isfinite(loss):
        raise UserError(f"the network's outputs are not finite (its loss is {loss}): its weights or ranges are damaged")
    return Accuracy(top1=top1 / n, top5=top5 / n, loss=loss / n, n_images=n)
