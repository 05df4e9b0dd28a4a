"""The three parts of a data set, and their loaders.

`train` trains, `val` is held out of the training images and guides every choice (pairs, search, best epoch), `test` is
touched by `test.py` alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler


class TensorImages(Dataset):
    """Images held in memory, indexed by whole batches so that augmentation is one tensor operation."""

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images[indices]
        return (images if self.augment is None else self.augment(images)), self.labels[indices]


@dataclass(frozen=True)
class Splits:
    """Train (augmented), `calibration` (the same images, the same at every look), validation and test images.

    `source` identifies the images, as plain data: what was measured on them records it.
    """

    train: Dataset
    calibration: Dataset
    val: Dataset
    test: Dataset
    source: dict[str, Any]


def make_loader(dataset: Dataset, batch_size: int, *, shuffle: bool = False, n_images: int | None = None) -> DataLoader:
    """Batches of (images, labels). Order and augmentation follow torch's global generator: seed it before an epoch.

    With `n_images` and `shuffle`, each epoch has so many images at most, drawn anew.
    """
    n = min(len(dataset), n_images or len(dataset))
    drop_last = shuffle and n % batch_size == 1  # BatchNorm cannot train on a single image
    order = RandomSampler(dataset, num_samples=n) if shuffle else SequentialSampler(dataset)
    if isinstance(dataset, TensorImages):
        return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last), batch_size=None)
    workers = min(8, os.cpu_count() or 1)
    return DataLoader(
        dataset,
        batch_size,
        sampler=order,
        drop_last=drop_last,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
