"""The session of a training or a measurement: images, device, seed, processes, precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from apq.files import Record
from dataset.splits import Batches, Splits, make_loader
from elastic_nn.training.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How training steps are executed.

    Attributes:
        amp: compute in bfloat16 where that is safe.
        accumulate: number of parts that a batch is cut into, to save memory; fewer where parts would have less than two
            images. BatchNorm and BatchQuant take statistics of each part by itself.
        ema: decay of the moving average of the weights that training ends with (None: no average).
        deterministic: compute by torch's deterministic algorithms, so that equal runs on a GPU give equal bits.
        rank, world_size: number of this process, and of the processes that share every batch.
    """

    amp: bool = False
    accumulate: int = 1
    ema: float | None = None
    deterministic: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress: the first one does."""
        return self.rank == 0

    def record(self, *, per_process: bool = False) -> Record:
        """The settings that the result depends on, as plain data.

        The number of processes is one of them only `per_process`, see `QuantScheme`. Records of before have no
        `deterministic`, so that it is there only if it is set.
        """
        rest = {"processes": self.world_size} if per_process else {}
        if self.deterministic:
            rest["deterministic"] = True
        return {"amp": self.amp, "accumulate": self.accumulate, "ema": self.ema, **rest}

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context of forward passes."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.amp)


ONE_PROCESS = Execution()


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a training or a measurement runs in. With `progress` the first process shows progress bars."""

    splits: Splits
    device: torch.device
    seed: int = 0
    execution: Execution = ONE_PROCESS
    progress: bool = False

    def alone(self, *, seed: int | None = None) -> Session:
        """The session of this process alone, which does not share its batches; optionally with another seed."""
        execution = replace(self.execution, rank=0, world_size=1)
        return replace(self, execution=execution, seed=self.seed if seed is None else seed)

    def loader(self, images: Dataset, batch_size: int, **rest: Any) -> Batches:
        """`make_loader` with the device of the session, and the rank and world size of this process."""
        part = {"device": self.device, "rank": self.execution.rank, "world_size": self.execution.world_size}
        return make_loader(images, batch_size, **part, **rest)

    def bar(self, steps: range, what: str) -> Progress:
        """The steps, with progress if the session shows it. A range that starts later continues earlier work."""
        shown = self.progress and self.execution.main
        return Progress(steps, what, steps.stop, done=steps.start, unit="epoch", shown=shown)
