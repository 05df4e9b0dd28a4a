"""The splits of a data set, and loaders whose batches any number of processes can share.

`train` is for training. `val` is held out of the training images and decides every choice (pairs, search, best epoch).
`test` is for `test.py` alone. The batches of a loader do not depend on the number of processes, see `batch_sizes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from apq.errors import UserError
from apq.files import Record
from dataset.file_batches import FileBatches, SeededBatches

LEAST_IMAGES = 2  # of each process in a batch: BatchNorm cannot train on one image
LEAST_REST = 16  # so many that 1 to 8 processes, with two images each, have the same batches of 64 and more


class ImageSpec(Protocol):
    """What images are prepared for, a SearchSpace or a ModelSpec: its channels, its largest resolution."""

    @property
    def name(self) -> str: ...

    @property
    def dataset(self) -> str: ...

    @property
    def in_channels(self) -> int: ...

    @property
    def n_classes(self) -> int: ...

    @property
    def resolutions(self) -> tuple[int, ...]: ...


class Batches(Protocol):
    """What a loader is: batches of images (N, C, H, W) and labels (N,), as often as they are asked for."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class TensorImages(Dataset):
    """Images in memory. They are indexed by batches, so that augmentation is one tensor operation."""

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images[indices]
        return (images if self.augment is None else self.augment(images)), self.labels[indices]

    def thinned(self, n: int) -> TensorImages:
        """At most n of the images, evenly spaced."""
        chosen = evenly_spaced(len(self), n)
        return TensorImages(self.images[chosen], self.labels[chosen], self.augment)


@dataclass(frozen=True)
class Splits:
    """The images of a data set.

    Attributes:
        train: training images, augmented anew each time.
        calibration: the same images without random augmentation.
        val, test: validation and test images.
        source: plain data that identifies the images, and how those of files are augmented. All that is measured on
            them records it. "names" in it has the classes of a network that is trained on them, in the order of its
            outputs.
    """

    train: Dataset
    calibration: Dataset
    val: Dataset
    test: Dataset
    source: Record


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    rank: int = 0,
    world_size: int = 1,
    sides: tuple[int, ...] = (),
    n_images: int | None = None,
    device: torch.device | None = None,
) -> Batches:
    """A loader of batches of (images, labels). Each process gets its part of every batch.

    Every image is in one batch, see `batch_sizes`. With `shuffle` there is no batch if there are fewer than two images
    for each process. Order and augmentation come from torch's global generator: seed it alike in all processes before
    an epoch.

    Args:
        batch_size: images a batch, of all processes together.
        rank, world_size: number of this process and of all processes. It gets images `rank::world_size` of every batch.
        sides: resolutions in pixels, of which each batch has a random one, the same in all processes. Images in memory
            are resized to it as a batch, those in files are cut from the whole picture. Without any it is the largest.
        n_images: with `shuffle`, the most images an epoch; they are drawn anew for every epoch. Else files are read up
            to the batch that has the last of so many images; those in memory are all there.
        device: where images of files are made ready (None: the CPU). Those in memory stay there.

    UserError where a shuffled batch has fewer than two images for each process.
    """
    if shuffle and batch_size < LEAST_IMAGES * world_size:
        raise UserError(f"{batch_size} images a step are too few for {world_size} process(es): each needs two")
    if isinstance(dataset, TensorImages):
        batches = _batches(dataset, batch_size, shuffle, world_size, n_images if shuffle else None)
        return DataLoader(dataset, sampler=batches, batch_size=None, collate_fn=_Part(rank, world_size, sides))
    batches = _batches(dataset, batch_size, shuffle, world_size, n_images)
    return FileBatches(dataset, SeededBatches(batches, rank, world_size, sides), device or torch.device("cpu"))


def evenly_spaced(n_all: int, n: int) -> list[int]:
    """Indices of at most `n` of `n_all` items, evenly spaced."""
    n = min(n_all, n)
    return [i * n_all // n for i in range(n)]


def resize(images: Tensor, side: int) -> Tensor:
    """Resize a batch to (N, C, side, side), antialiased."""
    if images.size(-1) == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


def batch_sizes(n_images: int, batch_size: int, world_size: int = 1) -> list[int]:
    """Numbers of images of the batches that `n_images` are cut into, for all processes together.

    All have `batch_size` but the last, which has the rest. A rest of less than a quarter of a batch and fewer than 16
    images, or of fewer than two for each process, joins the batch before it. So no image is left out, no process trains
    BatchNorm on one image, and the batches do not depend on the number of processes, up to 8 with 8 images each.

    >>> batch_sizes(144, 64), batch_sizes(143, 64), batch_sizes(144, 64, world_size=9), batch_sizes(5, 64)
    ([64, 64, 16], [64, 79], [64, 80], [5])
    """
    n_whole, rest = divmod(n_images, batch_size)
    if n_whole and rest < max(min(LEAST_REST, batch_size // 4), LEAST_IMAGES * world_size):
        return [batch_size] * (n_whole - 1) + [batch_size + rest]
    return [batch_size] * n_whole + ([rest] if rest else [])


class _Batches:
    """Batches of the indices of a sampler, for all processes together: all, or the first that have `most` images."""

    def __init__(self, order: Sampler[int], batch_size: int, world_size: int, most: int | None = None) -> None:
        self.order, self.sizes = order, batch_sizes(len(order), batch_size, world_size)
        if most is not None:
            before = itertools.accumulate(self.sizes, initial=0)
            self.sizes = [size for size, seen in zip(self.sizes, before, strict=False) if seen < most]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.order)
        return (list(itertools.islice(indices, size)) for size in self.sizes)


def _batches(dataset: Dataset, batch_size: int, shuffle: bool, world_size: int, n_images: int | None) -> _Batches:
    if not shuffle:
        return _Batches(SequentialSampler(dataset), batch_size, world_size, n_images)
    n = min(len(dataset), n_images or len(dataset))
    enough = n >= LEAST_IMAGES * world_size
    return _Batches(RandomSampler(dataset, num_samples=n) if enough else SequentialSampler(()), batch_size, world_size)


@dataclass(frozen=True)
class _Part:
    """Takes this process's part of a batch in memory and resizes it."""

    rank: int
    world_size: int
    sides: tuple[int, ...]

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = (part[self.rank :: self.world_size] for part in batch)
        if not self.sides:
            return images, labels
        choice = int(torch.randint(len(self.sides), ())) if len(self.sides) > 1 else 0
        return resize(images, self.sides[choice]), labels
