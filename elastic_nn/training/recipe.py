"""What a training recipe says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from apq.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: SGD with Nesterov momentum, one cosine from `lr` to 0 over all epochs.

    `kd_ratio` weighs the distillation loss against the labels' (1 is both equally); it needs a teacher.
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

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.lr > 0:
            raise UserError(f"training needs epochs >= 1, batch size >= 2, learning rate > 0, not {self}")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a supernet's training: which gene parts vary ("ks", "d", "e", "bits"), and the subnets of a step.

    Of the part that became elastic last only the largest choices are drawn, a share of `reach`. With `sandwich` the
    largest and the smallest subnet are among those of every step. In mixed precision a share of `float_share` of a
    random subnet's operands is not quantized. `epoch_images`: an epoch draws so many training images anew; None: all.
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
            raise UserError(f"phase {self.name}: float_share {self.float_share} is no share")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a space needs to go from nothing, or from another supernet, to predictors."""

    name: str
    phases: tuple[Phase, ...]
    pair_finetune: TrainConfig  # short: one for each quantized pair
    finetune: TrainConfig  # what quant_aware.py gives a found subnet
    recalibration_images: int
    pairs_float: int
    pairs_quant: int
    episode_images: int  # training images of the short finetune that scores one policy, by `pair_finetune`
    episode_val_images: int  # validation images that its score is measured on
    pair_epoch_images: int | None = None  # an epoch of `pair_finetune` draws so many training images; None: all
    epoch_val_images: int | None = None  # validation images that every epoch of a supernet is scored on; None: none
    predictor_hidden: int = 400  # width of the accuracy predictor's three layers


def with_batch_size(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with another number of images a step in every phase; the learning rates stay."""
    phases = (replace(phase, train=replace(phase.train, batch_size=batch_size)) for phase in recipe.phases)
    return replace(recipe, phases=tuple(phases))


def adjusted(
    config: TrainConfig, *, epochs: int | None = None, lr: float | None = None, batch_size: int | None = None
) -> TrainConfig:
    """The settings with those that are not None changed."""
    changes = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    return replace(config, **{name: value for name, value in changes.items() if value is not None})
