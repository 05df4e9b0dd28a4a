"""Batches of images that are read from files, by processes that all loaders share (`dataset.workers`).

A batch is read in chunks of a few images by all processes at once, so that the first batch of a split is there after
the time of a few images, also where a split is smaller than a batch for each process. Pixels travel as bytes: they
become numbers of a network on its device.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.table import PHOTOS, Scale
from dataset.workers import Key, read

CHUNK = 16  # images that a process reads at once
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SeededBatches:
    """This process's part of every batch, as (index, seed, side) for each image.

    Each image has a seed of its own, so that its augmentation does not depend on the worker and the process. A batch
    has one side, drawn from `sides`; None without any. `batches` has the indices of all processes.
    """

    batches: Collection[list[int]]
    rank: int
    world_size: int
    sides: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        seeds = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        for batch in self.batches:
            drawn = torch.randint(2**62, (len(batch),), generator=seeds).tolist()
            side = self.sides[drawn[0] % len(self.sides)] if self.sides else None  # before the processes part
            if part := list(zip(batch, drawn, strict=True))[self.rank :: self.world_size]:
                yield [(index, seed, side) for index, seed in part]


@dataclass(frozen=True)
class FileBatches:
    """A loader: batches of (images, labels) of a data set of files, see `make_loader`. The images are on `device`.

    Bytes are scaled as the data set's attribute `scale` says, or else as photos.
    """

    dataset: Dataset
    keys: SeededBatches
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        asked: deque[tuple[int, int]] = deque()  # numbers of images and chunks of the batches that are on the way

        def chunks() -> Iterator[list[Key]]:
            for part in self.keys:
                cut = [part[i : i + CHUNK] for i in range(0, len(part), CHUNK)]
                asked.append((len(part), len(cut)))
                yield from cut

        received = read(self.dataset, chunks(), pinned=self.device.type == "cuda")
        for first in received:
            n_images, n_chunks = asked.popleft()
            parts = (first if i == 0 else next(received) for i in range(n_chunks))
            with _one_thread():
                batch = self._batch(parts, n_images)
            yield batch

    def _batch(self, chunks: Iterator[tuple[Tensor, list[int]]], most: int) -> tuple[Tensor, Tensor]:
        """A batch of at most so many images. Each chunk is copied at once, for its memory is shared and short."""
        whole, labels = None, []
        for images, own in chunks:
            if not own:
                continue
            if whole is None:
                whole = torch.empty((most, *images.shape[1:]), dtype=images.dtype, device=self.device)
            whole[len(labels) : len(labels) + len(own)].copy_(images, non_blocking=True)
            labels += own
        if whole is None:
            return torch.zeros(0, 3, 1, 1), torch.zeros(0, dtype=torch.int64)
        whole = whole[: len(labels)]
        scale = getattr(self.dataset, "scale", PHOTOS)
        return (normalised(whole, scale) if whole.dtype == torch.uint8 else whole), torch.tensor(labels)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Context in which torch computes on one thread: others would wait for work on the cores that read images."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normalised(pixels: Tensor, scale: Scale = PHOTOS) -> Tensor:
    """Bytes of photos, (..., 3, H, W), as networks get them: by default, with the mean and deviation of ImageNet."""
    mean, std = _scale(pixels.device, scale)
    return pixels.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)


@functools.cache
def _scale(device: torch.device, scale: Scale) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (scale.mean, scale.std))
    return mean, std
