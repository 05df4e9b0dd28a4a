"""Training recipes as data: settings of one training, one phase of a supernet, and all settings for a space."""

from __future__ import annotations

from dataclasses import dataclass, replace

from apq.errors import UserError
from apq.policy import LINEAR
from apq.strata import PairStrata
from dataset.color_jitter import STRONG, ColorJitter

BATCHQUANT = "batchquant"
NO_CLIP = 1e30  # a `clip_norm` that changes no gradient

SCHEDULES = ("cosine", "constant", "exponential")  # of the learning rate
PREDICTORS = ("mlp", "kernel")  # what is trained on pairs
REWARDS = ("validation", "training")  # images on which an episode of a search for bits is rewarded


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: SGD with momentum (Nesterov's by default), and a schedule of the learning rate over all epochs.

    Schedules: "cosine" from `lr` to 0, "constant", and "exponential", which multiplies by `gamma` after every epoch.

    `batch_size` is that of all processes together. With a teacher, `kd_ratio` is the weight of the distillation loss
    relative to that of the labels. The norm of the gradients is clipped to `clip_norm`: that of the ranges of
    quantizers apart from that of all else, or with `clip_together` that of all. The learning rate rises from
    `warmup_lr` in the first `warmup_epochs`. `dropout` is that before the classifier of networks of a space; others
    have their own.

    UserError where a field is out of range.
    """

    epochs: int
    lr: float
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    kd_ratio: float = 1.0
    clip_norm: float = 5.0
    clip_together: bool = False
    warmup_epochs: int = 0
    warmup_lr: float = 0.0
    dropout: float = 0.0
    nesterov: bool = True
    schedule: str = "cosine"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.lr > 0:
            found = f"{self.epochs}, {self.batch_size} and {self.lr:g}"
            raise UserError(f"training needs epochs >= 1, batch size >= 2, learning rate > 0, not {found}")
        if not 0 <= self.dropout < 1 or not 0 <= self.warmup_lr <= self.lr:
            found = f"{self.dropout:g} and {self.warmup_lr:g}"
            raise UserError(f"dropout must be from 0 to 1, warm-up from 0 to the learning rate, not {found}")
        if self.schedule not in SCHEDULES or not 0 < self.gamma <= 1:
            known = ", ".join(SCHEDULES)
            raise UserError(f"the schedule must be one of {known} and gamma above 0, at most 1, not {self.gamma:g}")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a supernet's training. UserError where a field is out of range.

    Attributes:
        elastic: parts of the genes that vary: "resolution", "ks", "d", "e", "bits". The part that became elastic last
            comes last.
        subnets_per_step: number of subnets whose gradients a step adds up.
        reach: fraction of the choices of the last elastic part, from the largest down, that subnets are drawn from.
        sandwich: whether the largest and the smallest subnet are among the subnets of every step.
        random_ends: whether these have, in every step, one random kernel size for all slots and one random bit-width
            for all operands, as in QFA. Otherwise the largest has the largest kernels and the highest bits.
        float_share: in mixed precision, the probability of full precision for an operand of a random subnet, before
            those of a layer are coupled (`sampling.float_operands`), and for all operands of a random end.
        own_resolutions: whether the images of a subnet have its resolution: the largest one, unless "resolution" is
            elastic; for the smallest subnet of the sandwich the smallest one. They are the batch at the largest
            resolution, resized (the published code of QFA crops each size from the picture). Otherwise each batch has
            one of the space's resolutions.
        teacher_follows: whether the teacher sees the images at each subnet's resolution; otherwise once, as they come.
        epoch_images: number of training images an epoch, drawn anew (None: all).
    """

    name: str
    elastic: tuple[str, ...]
    train: TrainConfig
    subnets_per_step: int = 1
    reach: float = 1.0
    sandwich: bool = False
    random_ends: bool = False
    float_share: float = 0.0
    own_resolutions: bool = False
    teacher_follows: bool = False
    epoch_images: int | None = None

    def __post_init__(self) -> None:
        if self.subnets_per_step < (2 if self.sandwich else 1):
            raise UserError(f"phase {self.name}: {self.subnets_per_step} subnets a step are too few")
        if not 0 <= self.float_share <= 1:
            raise UserError(f"phase {self.name}: float_share {self.float_share} is not between 0 and 1")
        if self.float_share and self.sandwich and not self.random_ends:
            raise UserError(f"phase {self.name}: float_share needs random_ends")
        if self.random_ends and not self.sandwich:
            raise UserError(f"phase {self.name}: random_ends needs sandwich")


@dataclass(frozen=True, kw_only=True)
class OutlierRule:
    """Which pairs a predictor is not trained on: those with few others near them.

    A pair is a point of FLOPs (MACs w a / 64), in multiples of `flops_unit`, and top-1, in percent. In each of several
    rounds the pairs go whose mean distance to their `neighbours` nearest points, themselves included, is above the
    round's distance. The defaults are those of QFA's code, for about 8,000 pairs on ImageNet. UserError where a field
    is out of range.
    """

    distances: tuple[float, ...] = (0.55, 0.4, 0.4, 0.4)
    neighbours: int = 5
    flops_unit: float = 1e6

    def __post_init__(self) -> None:
        if self.neighbours < 2 or not self.flops_unit > 0 or not all(distance > 0 for distance in self.distances):
            found = f"{self.neighbours}, {self.flops_unit} and {self.distances}"
            raise UserError(f"outliers need neighbours >= 2, a unit and distances above 0, not {found}")


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
    predictor: str = PREDICTORS[0]  # of quantized pairs
    predictor_hidden: int = 400  # width of the three layers of the accuracy predictor, where it is an MLP
    quantizer: str = LINEAR  # of the subnets of a float supernet
    supernet_quantizer: str = BATCHQUANT  # of a supernet of mixed precision
    pair_strata: PairStrata | None = None  # strata that quantized pairs are drawn in (None: all choices are uniform)
    pair_outliers: OutlierRule | None = None  # quantized pairs that the predictor is not trained on (None: no pair)
    color_jitter: ColorJitter | None = STRONG  # of training images in folders (None: their colours stay)
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
