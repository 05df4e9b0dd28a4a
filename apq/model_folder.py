"""The folder of trained weights: `models/SPACE` or, for networks by name, `models/NAME`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apq.leftovers import sweep
from apq.lock import Lock, locked

DEFAULT_MODELS = Path("models/digits")
MODEL_FILES = frozenset(  # all that is written into such a folder
    {"training.json"}
    | {name + end for name in ("supernet", "model", "acc", "acc_quant") for end in (".pt", ".state.pt")}
)


@dataclass(frozen=True)
class ModelFolder:
    """Files: `supernet.pt`, `training.json` (its record), `acc.pt` and `acc_quant.pt` (the two accuracy predictors).

    The folder of a network by name has `model.pt` alone. In a folder of published files the supernet is `imagenet-OFA`.
    """

    path: Path

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        """Hold the folder's lock, and remove what killed writes left there. UserError names another holder."""
        with locked(self.path) as lock:
            sweep(lock.folder, MODEL_FILES.__contains__)
            yield lock

    @property
    def supernet(self) -> Path:
        own, published = self.path / "supernet.pt", self.path / "imagenet-OFA"
        return published if published.exists() and not own.exists() else own

    @property
    def supernet_state(self) -> Path:
        return self.path / "supernet.state.pt"

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    @property
    def model_state(self) -> Path:
        return self.path / "model.state.pt"

    @property
    def acc(self) -> Path:
        return self.path / "acc.pt"

    @property
    def acc_quant(self) -> Path:
        return self.path / "acc_quant.pt"

    def state_of(self, predictor: Path) -> Path:
        """The state of a predictor's unfinished training."""
        return predictor.with_suffix(".state.pt")

    @property
    def training(self) -> Path:
        return self.path / "training.json"
