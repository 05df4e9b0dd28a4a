"""Settings of the sequential baseline: the budgets and settings of its stages. This module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apq.errors import UserError
from apq.policy import LINEAR
from elastic_nn.training.recipe import TrainConfig
from methods.search.evolution_finder import EvolutionConfig
from methods.search.settings import AgentConfig, BitSearch


@dataclass(frozen=True, kw_only=True)
class Split:
    """Budgets of the three stages. The last one is `constraint`. UserError where a field is out of range.

    The budget of the bits is `preserve_ratio` times that of pruning, which is `prune_ratio` times that of the
    architecture; the latter two are at 8 bits. `architecture`, if given, replaces the budget of the first stage.
    """

    constraint: float
    prune_ratio: float = 0.75
    preserve_ratio: float = 0.6
    architecture: float | None = None

    def __post_init__(self) -> None:
        budgets = [self.constraint, *([] if self.architecture is None else [self.architecture])]
        if not all(0 < budget < math.inf for budget in budgets):
            raise UserError("the final budget and that of the architecture must be positive numbers")
        if not (0 < self.prune_ratio <= 1 and 0 < self.preserve_ratio <= 1):
            raise UserError(
                f"ratios must be above 0, at most 1, not {self.prune_ratio} for pruning, {self.preserve_ratio} for bits"
            )

    @property
    def architecture_budget(self) -> float:
        """The most that the architecture may cost, at 8 bits."""
        return self.pruning_budget / self.prune_ratio if self.architecture is None else self.architecture

    @property
    def pruning_budget(self) -> float:
        """The most that the pruned network may cost, at 8 bits."""
        return self.constraint / self.preserve_ratio


@dataclass(frozen=True, kw_only=True)
class ArchitectureSearch:
    """Settings of the first stage. Its result costs at most `budget`, in the unit of `quantity` (one of UNITS)."""

    quantity: str
    budget: float
    evolution: EvolutionConfig


@dataclass(frozen=True, kw_only=True)
class WidthSearch:
    """Settings of the pruning stage. The network costs at most `budget`, in the unit of `quantity` (one of UNITS).
    An episode recalibrates BatchNorm on `recalibration_images` and is scored on `val_images`.
    """

    quantity: str
    budget: float
    recalibration_images: int
    val_images: int
    agent: AgentConfig

    def __post_init__(self) -> None:
        if min(self.recalibration_images, self.val_images) < 1:
            raise UserError("an episode needs at least one image to recalibrate on and one validation image")


@dataclass(frozen=True, kw_only=True)
class SequentialConfig:
    """Settings of all stages. UserError where one is out of range.

    Attributes:
        quantity: the cost that is limited, one of UNITS.
        split, evolution, pruning_agent, bits_agent: budgets, and settings of the three searches.
        recalibration_images, train_images: images that an episode of pruning recalibrates on, and that one of the
            search for bits trains on.
        val_images: validation images that episodes are scored on.
        finetune: training of the pruned float network.
        min_bit, max_bit, keep_ends: range of the bits, and whether the first and last layer keep 8 bits.
        quantizer: name of a quantizer that accelerators have costs of.
    """

    quantity: str
    split: Split
    evolution: EvolutionConfig
    pruning_agent: AgentConfig
    recalibration_images: int
    finetune: TrainConfig
    bits_agent: AgentConfig
    train_images: int
    val_images: int
    min_bit: int = 2
    max_bit: int = 8
    keep_ends: bool = True
    quantizer: str = LINEAR

    def __post_init__(self) -> None:
        _ = self.widths, self.bits  # settings of later stages are checked before the first one runs

    @property
    def architecture(self) -> ArchitectureSearch:
        """Settings of the first stage."""
        budget = self.split.architecture_budget
        return ArchitectureSearch(quantity=self.quantity, budget=budget, evolution=self.evolution)

    @property
    def widths(self) -> WidthSearch:
        """Settings of the pruning stage."""
        return WidthSearch(
            quantity=self.quantity,
            budget=self.split.pruning_budget,
            recalibration_images=self.recalibration_images,
            val_images=self.val_images,
            agent=self.pruning_agent,
        )

    @property
    def bits(self) -> BitSearch:
        """Settings of the last stage."""
        return BitSearch(
            quantizer=self.quantizer,
            quantity=self.quantity,
            ratio=self.split.preserve_ratio,  # no effect, because there is a budget
            budget=self.split.constraint,
            min_bit=self.min_bit,
            max_bit=self.max_bit,
            keep_ends=self.keep_ends,
            train_images=self.train_images,
            val_images=self.val_images,
        )
