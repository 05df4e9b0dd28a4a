"""Settings of the sequential baseline: how its budget is split, and what each stage does. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from apq.errors import UserError
from elastic_nn.training.recipe import TrainConfig
from methods.search.evolution_finder import EvolutionConfig
from methods.search.settings import AgentConfig, BitSearch


@dataclass(frozen=True, kw_only=True)
class Split:
    """Budgets of the stages on the way to the final one, `constraint`.

    The bits get `preserve_ratio` of the pruned network's budget, and pruning gets `prune_ratio` of the architecture's,
    both at 8 bits. These are limits: a stage that ends below its own leaves the next one less to do. `architecture`
    replaces the first stage's budget alone.
    """

    constraint: float
    prune_ratio: float = 0.75
    preserve_ratio: float = 0.6
    architecture: float | None = None

    def __post_init__(self) -> None:
        if not self.constraint > 0 or (self.architecture is not None and not self.architecture > 0):
            raise UserError("the final and the architecture's budget must be positive")
        if not (0 < self.prune_ratio <= 1 and 0 < self.preserve_ratio <= 1):
            raise UserError(
                f"ratios lie above 0 and up to 1, not {self.prune_ratio} of pruning, {self.preserve_ratio} of bits"
            )

    @property
    def architecture_budget(self) -> float:
        """Most that the architecture may cost at 8 bits."""
        return self.pruning_budget / self.prune_ratio if self.architecture is None else self.architecture

    @property
    def pruning_budget(self) -> float:
        """Most that the pruned network may cost at 8 bits."""
        return self.constraint / self.preserve_ratio


@dataclass(frozen=True, kw_only=True)
class ArchitectureSearch:
    """Settings of the first stage: it costs at most `budget`, in the unit of `quantity` (one of UNITS)."""

    quantity: str
    budget: float
    evolution: EvolutionConfig


@dataclass(frozen=True, kw_only=True)
class WidthSearch:
    """Settings of the pruning stage: the network costs at most `budget`, in the unit of `quantity` (one of UNITS).

    An episode recalibrates BatchNorm on `recalibration_images` and is scored on `val_images`.
    """

    quantity: str
    budget: float
    recalibration_images: int
    val_images: int
    agent: AgentConfig

    def __post_init__(self) -> None:
        if min(self.recalibration_images, self.val_images) < 1:
            raise UserError("an episode needs images to recalibrate on and validation images")


@dataclass(frozen=True, kw_only=True)
class SequentialConfig:
    """Settings of all stages. `quantity` is one of UNITS.

    An episode of pruning recalibrates on `recalibration_images`; one of the bits stage trains on `train_images`. Both
    are scored on `val_images`. `finetune` trains the pruned float network. Bits go from `min_bit` to `max_bit`;
    `keep_ends` keeps the first and last layer at 8 bits.
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
            quantizer="linear",
            quantity=self.quantity,
            ratio=self.split.preserve_ratio,  # has no effect beside a budget
            budget=self.split.constraint,
            min_bit=self.min_bit,
            max_bit=self.max_bit,
            keep_ends=self.keep_ends,
            train_images=self.train_images,
            val_images=self.val_images,
        )
