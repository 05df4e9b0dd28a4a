"""Training recipes as data: settings of one training, one phase of a supernet, and all settings for a space."""

from __future__ import annotations

from dataclasses import dataclass, replace

from apq.errors import UserError
from apq.policy import LINEAR

SCHEDULES = ("cosine", "constant", "exponential")  # of the learning rate
REWARDS = ("validation", "training")  # images on which an episode of a search for bits is rewarded


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: SGD with momentum (Nesterov's by default), and a schedule of the learning rate over all epochs.

    Schedules: "cosine" from `lr` to 0, "constant", and "exponential", which multiplies by `gamma` after every epoch.

    `batch_size` is that of all processes together. With a teacher, `kd_ratio` is the weight of the distillation loss
    relative to that of the labels. UserError where a field is out of range.
    """

    epochs: int
    lr: float
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    kd_ratio: float = 1.0
    clip_norm: float = 5.0
    warmup_epochs: int = 0
    nesterov: bool = True
    schedule: str = "cosine"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.lr > 0:
            found = f"{self.epochs}, {self.batch_size} and {self.lr:g}"
            raise UserError(f"training needs epochs >= 1, batch size >= 2, learning rate > 0, not {found}")
        if self.schedule not in SCHEDULES or not 0 < self.gamma <= 1:
            known = ", ".join(SCHEDULES)
            raise UserError(f"the schedule must be one of {known} and gamma above 0, at most 1, not {self.gamma:g}")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a supernet's training. UserError where a field is out of range.

    Attributes:
        elastic: parts of the genes that vary: "ks", "d", "e", "bits". The part that became elastic last comes last.
        subnets_per_step: number of subnets whose gradients a step adds up.
        reach: fraction of the choices of the last elastic part, from the largest down, that subnets are drawn from.
        sandwich: whether the largest and the smallest subnet are among the subnets of every step.
        float_share: in mixed precision, the fraction of the operands of a random subnet in full precision.
        epoch_images: number of training images an epoch, drawn anew (None: all).
    """

    name: str
    elastic: tuple[str, ...]
    train: TrainConfig
    subnets_per_step: int = 1
    reach: float = 1.0
    sandwich: bool = False
    float_share: float = 0.0
    epoch_images: int | None = None

    def __post_init__(self) -> None:
        if self.subnets_per_step < (2 if self.sandwich else 1):
            raise UserError(f"phase {self.name}: {self.subnets_per_step} subnets a step are too few")
        if not 0 <= self.float_share <= 1:
            raise UserError(f"phase {self.name}: float_share {self.float_share} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of training for a space, from the supernet to accuracy predictors and the final finetune."""

    name: str
    phases: tuple[Phase, ...]
    pair_finetune: TrainConfig  # short finetune of each quantized pair
    finetune: TrainConfig  # finetune of a found subnet by quant_aware.py
    recalibration_images: int
    pairs_float: int
    pairs_quant: int
    episode_images: int  # training images an epoch of the short finetune of a policy
    episode_val_images: int  # validation images that a policy is scored on
    pair_epoch_images: int | None = None  # training images an epoch of `pair_finetune`, drawn anew (None: all)
    epoch_val_images: int | None = None  # validation images after every epoch of a supernet (None: not measured)
    predictor_hidden: int = 400  # width of the three layers of the accuracy predictor
    quantizer: str = LINEAR  # of the subnets of a float supernet
    episode_finetune: TrainConfig | None = None  # short finetune of a policy (None: one epoch of `pair_finetune`)
    reward: str = REWARDS[0]  # images on which a policy is scored: validation, or those of its finetune, during it

    @property
    def episode(self) -> TrainConfig:
        """The short finetune of a policy, in an episode of a search for bits."""
        return self.episode_finetune or replace(self.pair_finetune, epochs=1)


def with_batch_size(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with another batch size in every phase. Learning rates do not change."""
    phases = (replace(phase, train=replace(phase.train, batch_size=batch_size)) for phase in recipe.phases)
    return replace(recipe, phases=tuple(phases))


def with_quantizer(recipe: Recipe, quantizer: str | None) -> Recipe:
    """The recipe with another quantizer for the subnets of a float supernet; None leaves it as it is."""
    return recipe if quantizer is None else replace(recipe, quantizer=quantizer)


def adjusted(
    config: TrainConfig, *, epochs: int | None = None, lr: float | None = None, batch_size: int | None = None
) -> TrainConfig:
    """The settings with changes; None leaves a setting as it is."""
    changes = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    return replace(config, **{name: value for name, value in changes.items() if value is not None})
