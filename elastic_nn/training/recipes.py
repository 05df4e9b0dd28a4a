"""Training recipes as data: progressive shrinking, finetune and pair gathering for each space."""

from __future__ import annotations

from dataclasses import dataclass, replace

from apq.errors import UserError
from dataset.splits import ImageSpec
from elastic_nn.training.engine import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of progressive shrinking: which gene parts vary ("ks", "d", "e") and how many subnets share a step.

    Of the part that became elastic last only the largest choices are drawn, a share of `reach`.
    """

    name: str
    elastic: tuple[str, ...]
    train: TrainConfig
    subnets_per_step: int = 1
    reach: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a space needs to go from nothing to predictors."""

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


def _phases(train: dict[str, TrainConfig]) -> tuple[Phase, ...]:
    elastic = {"largest": (), "kernel": ("ks",), "depth": ("ks", "d"), "width": ("ks", "d", "e")}
    return tuple(
        Phase(name=name, elastic=elastic[name], train=config, subnets_per_step=2 if name in ("depth", "width") else 1)
        for name, config in train.items()
    )


DIGITS_RECIPE = Recipe(
    name="digits",
    phases=_phases(
        {
            "largest": TrainConfig(epochs=60, lr=0.1, warmup_epochs=2),
            "kernel": TrainConfig(epochs=20, lr=0.05),
            "depth": TrainConfig(epochs=20, lr=0.05),
            "width": TrainConfig(epochs=40, lr=0.05),
        }
    ),
    pair_finetune=TrainConfig(epochs=2, lr=0.02, label_smoothing=0.0),
    finetune=TrainConfig(epochs=15, lr=0.02, label_smoothing=0.0),
    recalibration_images=1024,
    pairs_float=1000,
    pairs_quant=300,
    episode_images=640,
    episode_val_images=1000,
)

# Twenty times the images of digits: fewer epochs of them, fewer pairs, finetunes on a part drawn anew.
GLYPHS_RECIPE = Recipe(
    name="glyphs",
    phases=_phases(
        {
            "largest": TrainConfig(epochs=18, lr=0.1, warmup_epochs=1),
            "kernel": TrainConfig(epochs=4, lr=0.05),
            "depth": TrainConfig(epochs=5, lr=0.05),
            "width": TrainConfig(epochs=10, lr=0.05),
        }
    ),
    pair_finetune=TrainConfig(epochs=1, lr=0.02, label_smoothing=0.0),
    finetune=TrainConfig(epochs=5, lr=0.02, label_smoothing=0.0),
    recalibration_images=1024,
    pairs_float=500,
    pairs_quant=200,
    episode_images=640,
    episode_val_images=1000,
    pair_epoch_images=2000,
)

# For tests and for trying out a set-up: it runs the whole way in seconds and reaches nothing.
TINY_RECIPE = Recipe(
    name="tiny",
    phases=_phases({name: TrainConfig(epochs=1, lr=0.05) for name in ("largest", "kernel", "depth", "width")}),
    pair_finetune=TrainConfig(epochs=1, lr=0.01),
    finetune=TrainConfig(epochs=2, lr=0.01),
    recalibration_images=128,
    pairs_float=24,
    pairs_quant=12,
    episode_images=64,
    episode_val_images=64,
)


def _published_phases() -> tuple[Phase, ...]:
    """Once-for-all's schedule (ICLR 2020, section 4.1): 2,048 images a step, warm-up of 5 epochs in the long phases.

    Depth and width become elastic in two steps, first down to the middle choice, then to the smallest.
    """

    def train(epochs: int, lr: float, warmup_epochs: int = 0) -> TrainConfig:
        return TrainConfig(epochs=epochs, lr=lr, batch_size=2048, weight_decay=3e-5, warmup_epochs=warmup_epochs)

    depth, width = ("ks", "d"), ("ks", "d", "e")
    return (
        Phase(name="largest", elastic=(), train=train(180, 2.6, 5)),
        Phase(name="kernel", elastic=("ks",), train=train(125, 0.96, 5)),
        Phase(name="depth-1", elastic=depth, train=train(25, 0.08), subnets_per_step=2, reach=2 / 3),
        Phase(name="depth-2", elastic=depth, train=train(125, 0.24, 5), subnets_per_step=2),
        Phase(name="width-1", elastic=width, train=train(25, 0.08), subnets_per_step=4, reach=2 / 3),
        Phase(name="width-2", elastic=width, train=train(125, 0.24, 5), subnets_per_step=4),
    )


# The published numbers, for ImageNet on a cluster. Finetune: APQ (CVPR 2020), section 4.
APQ_IMAGENET_RECIPE = Recipe(
    name="apq-imagenet",
    phases=_published_phases(),
    pair_finetune=TrainConfig(epochs=1, lr=1e-3, batch_size=256, weight_decay=4e-5),
    pair_epoch_images=256_000,  # a fifth of ImageNet, or 5,000 pairs would cost 5,000 epochs
    finetune=TrainConfig(epochs=30, lr=1e-3, batch_size=256, weight_decay=4e-5, label_smoothing=0.1),
    recalibration_images=2000,
    pairs_float=80_000,
    pairs_quant=5_000,
    episode_images=20_000,  # as HAQ's code takes
    episode_val_images=10_000,
)

RECIPES = {recipe.name: recipe for recipe in (DIGITS_RECIPE, GLYPHS_RECIPE, APQ_IMAGENET_RECIPE, TINY_RECIPE)}


def with_batch_size(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with another number of images a step in every phase; the learning rates stay."""
    phases = (replace(phase, train=replace(phase.train, batch_size=batch_size)) for phase in recipe.phases)
    return replace(recipe, phases=tuple(phases))


def get_recipe(name: str | None, spec: ImageSpec) -> Recipe:
    """A recipe by name; None: the one named like the space (or model) or its images. UserError names the known ones."""
    known = ", ".join(RECIPES)
    if name is None:
        name = next((known for known in (spec.name, spec.dataset) if known in RECIPES), "")
        if not name:
            raise UserError(f"{spec.name} has no training recipe of its own: give --recipe, one of {known}")
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; known: {known}")
    return RECIPES[name]
