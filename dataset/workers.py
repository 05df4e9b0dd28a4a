"""Processes that read items of data sets. They are started once, and serve all splits, sizes and steps after that.

A data set is known to the processes that are started after it was made. One that came later, as a part of the images
that was chosen since, has new processes started, which takes less than a second.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from apq.machine import n_cores
from apq.processes import process_number

MOST_WORKERS = 32
AHEAD = 4  # chunks that each process reads before they are asked for

Key = tuple[int, int, int | None]  # (index, seed, side) of an item, see `FolderImages`

_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, Dataset] = weakref.WeakValueDictionary()
_number_of: weakref.WeakKeyDictionary[Dataset, int] = weakref.WeakKeyDictionary()
_idle: list[Workers] = []


def announce(dataset: Dataset) -> int:
    """Make a data set known to the processes that are started later. Returns its number."""
    if dataset not in _number_of:
        _number_of[dataset] = next(_numbers)
        _known[_number_of[dataset]] = dataset
    return _number_of[dataset]


def read(dataset: Dataset, chunks: Iterable[list[Key]], *, pinned: bool = False) -> Iterator[tuple[Any, list[int]]]:
    """Read chunks of items of a data set in all processes: their images as one tensor, and labels, in order.

    What an item is None of is left out: a chunk may be shorter than asked, and empty. With `pinned` the images are in
    memory that is fast to copy to a GPU. Chunks that were asked for, but not taken, are read all the same.
    """
    number = announce(dataset)
    workers = _free(number, pinned)
    try:
        yield from workers.read([(number, key) for key in chunk] for chunk in chunks)
    except GeneratorExit:  # the caller has seen enough
        _idle.append(workers)
        raise
    _idle.append(workers)  # after any other exception they end


def end_workers() -> None:
    """End the processes that wait for work."""
    _idle.clear()


def n_workers() -> int:
    """Number of processes that read for this one: the cores, shared with the processes that torchrun started."""
    return max(1, min(MOST_WORKERS, n_cores() // max(1, process_number("LOCAL_WORLD_SIZE", 1))))


class Workers:
    """Processes that know some data sets, and read for one caller at a time."""

    def __init__(self, n: int, pinned: bool) -> None:
        self.kind: Hashable = (n, pinned)
        self.known, self.chunks = dict(_known), _Chunks()
        self.loader = DataLoader(
            _Numbered(self.known),
            batch_sampler=self.chunks,
            collate_fn=_stacked,
            num_workers=n,
            prefetch_factor=AHEAD,
            persistent_workers=True,
            pin_memory=pinned,
            generator=torch.Generator(),  # seeds of workers are not drawn from the global generator
        )

    def alive(self) -> bool:
        """Whether none of them was killed."""
        started = self.loader._iterator  # torch tells it nowhere else
        return started is None or all(worker.is_alive() for worker in started._workers)

    def read(self, chunks: Iterable[list[tuple[int, Key]]]) -> Iterator[tuple[Any, list[int]]]:
        """Read chunks of numbered items."""
        self.chunks.asked = iter(chunks)
        return iter(self.loader)


def _free(number: int, pinned: bool) -> Workers:
    """Processes that wait, know the data set of this number, and are of the right kind; or new ones.

    Others that wait end.
    """
    kind = (n_workers(), pinned)
    while _idle:
        workers = _idle.pop()
        if workers.kind == kind and number in workers.known and workers.alive():
            return workers
    return Workers(*kind)


class _Chunks:
    """What is read next. The loader asks for an iterator whenever it begins anew."""

    asked: Iterator[list[tuple[int, Key]]] = iter(())

    def __iter__(self) -> Iterator[list[tuple[int, Key]]]:
        return self.asked


class _Numbered(Dataset):
    """Items of several data sets, by the number of the data set and the key there."""

    def __init__(self, known: dict[int, Dataset]) -> None:
        self.known = known

    def __getitem__(self, key: tuple[int, Key]) -> Any:
        number, own = key
        return self.known[number][own]


def _stacked(items: list[tuple[torch.Tensor, int, int] | None]) -> tuple[torch.Tensor, list[int]]:
    """The images of a chunk and their labels. Items are (image, label, seed), or None if an image cannot be read."""
    found = [item for item in items if item is not None]
    if not found:
        return torch.zeros(0, 3, 1, 1), []
    return torch.stack([image for image, _, _ in found]), [int(label) for _, label, _ in found]
