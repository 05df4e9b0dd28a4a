"""What a training or a measurement runs in: images, device, seed, processes, precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apq.files import Record
from dataset.splits import Splits, make_loader


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the steps of a training are carried out.

    `amp` computes in bfloat16 where that is safe. `accumulate` cuts a batch into that many parts, which need less
    memory (BatchNorm and BatchQuant then take each part by itself). `ema`, a decay, ends with the moving average of the
    weights. `rank` is this process's number among the `world_size` processes that split every batch.
    """

    amp: bool = False
    accumulate: int = 1
    ema: float | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def record(self) -> Record:
        """What a continued training must repeat, as plain data. The number of processes may change."""
        return {"amp": self.amp, "accumulate": self.accumulate, "ema": self.ema}

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that forward passes run in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.amp)


ONE_PROCESS = Execution()


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a training or a measurement runs in. With `progress` the first process shows bars on a terminal."""

    splits: Splits
    device: torch.device
    seed: int = 0
    execution: Execution = ONE_PROCESS
    progress: bool = False

    def alone(self, *, seed: int | None = None) -> Session:
        """The same in this process alone, which splits no batch with others; optionally with another seed."""
        execution = replace(self.execution, rank=0, world_size=1)
        return replace(self, execution=execution, seed=self.seed if seed is None else seed)

    def loader(self, images: Dataset, batch_size: int, **rest: Any) -> DataLoader:
        """`make_loader` for this process's part of every batch."""
        part = {"rank": self.execution.rank, "world_size": self.execution.world_size}
        return make_loader(images, batch_size, **part, **rest)

    def bar(self, steps: Iterable[int], what: str, **rest: Any) -> tqdm:
        """The steps, with a progress bar where one is wanted."""
        return tqdm(steps, desc=what, disable=None if self.progress and self.execution.main else True, **rest)
