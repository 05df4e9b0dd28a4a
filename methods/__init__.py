"""Search methods, one package each, and the table of modes of `search.py --mode`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from apq.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A mode of `search.py`.

    `module` has `build_parser() -> Parser`, with the flags of this mode, and `run(args) -> None`. It is imported when
    the mode is chosen, and imports torch and other slow libraries inside `run`. `summary` is its line in
    `search.py --help`. `shares`: the processes of torchrun share its work; otherwise the first one does it all.
    """

    name: str
    module: str
    summary: str
    shares: bool = False

    def load(self) -> ModuleType:
        """Import the module of the mode; UserError where there is none."""
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise UserError(f"--mode {self.name}: {error}") from error


DEFAULT_MODE = "evolution"

# A method from outside adds a row: MODES["random"] = Mode(name="random", module="my_package.random_search", ...)
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            name="evolution",
            module="methods.evolution.command",
            summary="architecture, channel pruning and bits together, under one budget (the default)",
            shares=True,
        ),
        Mode(
            name="nsga2",
            module="methods.nsga2.command",
            summary="the front of accuracy and costs, for all budgets at once; pick or measure points of it later",
            shares=True,
        ),
        Mode(
            name="coarse_to_fine",
            module="methods.coarse_to_fine.command",
            summary="measure subnets of a supernet that needs no finetune, keep the best for their MACs",
            shares=True,
        ),
        Mode(
            name="ddpg",
            module="methods.ddpg.command",
            summary="the bits of each layer of one trained network, by a reinforcement-learning agent (HAQ)",
            shares=True,
        ),
        Mode(
            name="sensitivity",
            module="methods.sensitivity.command",
            summary="the bits of each layer of one trained network, by measured sensitivities and integer programming",
            shares=True,
        ),
        Mode(
            name="sequential",
            module="methods.sequential.command",
            summary="architecture, then pruning, then bits: the baseline of joint search",
            shares=True,
        ),
    )
}
PREPARE = Mode(
    name="prepare",
    module="methods.prepare.command",
    summary="gather <subnet, accuracy> pairs and train the accuracy predictor on them",
    shares=True,
)
