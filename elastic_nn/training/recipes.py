"""The training recipes by name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from apq.bit_widths import bits_throughout
from apq.errors import UserError
from apq.policy import LINEAR_PUBLISHED
from apq.presets import find_preset
from apq.space import SearchSpace
from dataset.table import DATASETS
from elastic_nn.training.haq_recipes import HAQ_IMAGENET_KMEANS_RECIPE, HAQ_IMAGENET_LINEAR_RECIPE
from elastic_nn.training.recipe import Phase, Recipe, TrainConfig

if TYPE_CHECKING:
    from dataset.splits import ImageSpec


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

# Glyphs have twenty times the images of digits: fewer epochs, fewer pairs, and short finetunes on part of the images.
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

# For tests and to try a setup: all steps run in seconds, and nothing is trained well.
TINY_RECIPE = Recipe(
    name="tiny",
    phases=tuple(
        replace(phase, epoch_images=1024)
        for phase in _phases({name: TrainConfig(epochs=1, lr=0.05) for name in ("largest", "kernel", "depth", "width")})
    ),
    pair_finetune=TrainConfig(epochs=1, lr=0.01),
    finetune=TrainConfig(epochs=2, lr=0.01),
    recalibration_images=128,
    pairs_float=24,
    pairs_quant=12,
    episode_images=64,
    episode_val_images=64,
)


def _published_phases() -> tuple[Phase, ...]:
    """Once-for-all's schedule (ICLR 2020, section 4.1): batch size 2,048, warm-up of 5 epochs in the long phases.

    Depths and mid channels become elastic in two phases: first down to the middle choice, then to the smallest.
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
    pair_epoch_images=256_000,  # a fifth of ImageNet, because there are 5,000 pairs
    finetune=TrainConfig(epochs=30, lr=1e-3, batch_size=256, weight_decay=4e-5, label_smoothing=0.1),
    recalibration_images=2000,
    pairs_float=80_000,
    pairs_quant=5_000,
    episode_images=20_000,  # as in HAQ's code
    episode_val_images=10_000,
    quantizer=LINEAR_PUBLISHED,
)


def _sandwich(train: TrainConfig, epoch_images: int | None = None) -> Phase:
    """A phase by the sandwich rule: the largest, the smallest and two random subnets a step."""
    return Phase(
        name="sandwich",
        elastic=("ks", "d", "e"),
        train=train,
        subnets_per_step=4,
        sandwich=True,
        epoch_images=epoch_images,
    )


TINY_SANDWICH_RECIPE = replace(
    TINY_RECIPE,
    name="tiny-sandwich",
    phases=(TINY_RECIPE.phases[0], _sandwich(TrainConfig(epochs=1, lr=0.05), epoch_images=256)),
    epoch_val_images=64,
)


def _oqa_imagenet(epochs: int, lr: float, warmup_epochs: int = 0) -> TrainConfig:
    return TrainConfig(epochs=epochs, lr=lr, batch_size=1024, warmup_epochs=warmup_epochs)


# OQA (arXiv 2010.04354): epochs, batch size, learning rates at 3 and 2 bits and recalibration images are the paper's.
# Ours are the learning rates at 4 bits (half of those of once-for-all's first and last phases, for half the batch size)
# and all settings of predictors, which OQA does not have.
OQA_IMAGENET_RECIPE = replace(
    APQ_IMAGENET_RECIPE,
    name="oqa-imagenet",
    phases=(
        Phase(name="largest", elastic=(), train=_oqa_imagenet(150, 1.3, warmup_epochs=5)),
        _sandwich(_oqa_imagenet(200, 0.12, warmup_epochs=5)),
    ),
    recalibration_images=4096,
    epoch_val_images=10_000,
)
OQA_IMAGENET_3BIT_RECIPE = replace(
    OQA_IMAGENET_RECIPE, name="oqa-imagenet-3bit", phases=(_sandwich(_oqa_imagenet(25, 0.0016)),)
)
OQA_IMAGENET_2BIT_RECIPE = replace(
    OQA_IMAGENET_RECIPE, name="oqa-imagenet-2bit", phases=(_sandwich(_oqa_imagenet(120, 0.0256)),)
)

# The same for glyphs, in minutes on one CPU core.
OQA_GLYPHS_RECIPE = replace(
    GLYPHS_RECIPE,
    name="oqa-glyphs",
    phases=(
        Phase(name="largest", elastic=(), train=TrainConfig(epochs=16, lr=0.3, warmup_epochs=1)),
        _sandwich(TrainConfig(epochs=12, lr=0.1), epoch_images=10_000),
    ),
    epoch_val_images=1000,
)
OQA_GLYPHS_3BIT_RECIPE = replace(
    OQA_GLYPHS_RECIPE, name="oqa-glyphs-3bit", phases=(_sandwich(TrainConfig(epochs=4, lr=0.05), epoch_images=10_000),)
)
OQA_GLYPHS_2BIT_RECIPE = replace(
    OQA_GLYPHS_RECIPE, name="oqa-glyphs-2bit", phases=(_sandwich(TrainConfig(epochs=6, lr=0.05), epoch_images=10_000),)
)


def _qfa_phases(with_float: TrainConfig, bits: TrainConfig, epoch_images: int | None = None) -> tuple[Phase, ...]:
    """QFA's two phases, with four random subnets a step. In the first, full precision is one of the choices of bits."""
    both = {"elastic": ("ks", "d", "e", "bits"), "subnets_per_step": 6, "sandwich": True, "epoch_images": epoch_images}
    return (
        Phase(name="bits and float", train=with_float, float_share=1 / 4, **both),
        Phase(name="bits", train=bits, **both),
    )


# QFA (arXiv 2105.08952): epochs, learning rate (2.5e-3 for every 64 images) and weight decay are the paper's. The batch
# size of 1,024 and the settings of pairs are ours.
QFA_IMAGENET_RECIPE = replace(
    OQA_IMAGENET_RECIPE,
    name="qfa-imagenet",
    phases=_qfa_phases(
        TrainConfig(epochs=60, lr=0.04, batch_size=1024, weight_decay=3e-5),
        TrainConfig(epochs=120, lr=0.04, batch_size=1024, weight_decay=3e-5),
    ),
    pairs_quant=16_000,
    predictor_hidden=600,
)
QFA_GLYPHS_RECIPE = replace(
    OQA_GLYPHS_RECIPE,
    name="qfa-glyphs",
    phases=_qfa_phases(TrainConfig(epochs=3, lr=0.05), TrainConfig(epochs=6, lr=0.05), epoch_images=8000),
    pairs_quant=600,
    predictor_hidden=600,
)
TINY_QFA_RECIPE = replace(
    TINY_SANDWICH_RECIPE,
    name="tiny-qfa",
    phases=_qfa_phases(TrainConfig(epochs=1, lr=0.05), TrainConfig(epochs=1, lr=0.05), epoch_images=128),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        DIGITS_RECIPE,
        GLYPHS_RECIPE,
        APQ_IMAGENET_RECIPE,
        TINY_RECIPE,
        TINY_SANDWICH_RECIPE,
        OQA_IMAGENET_RECIPE,
        OQA_IMAGENET_3BIT_RECIPE,
        OQA_IMAGENET_2BIT_RECIPE,
        OQA_GLYPHS_RECIPE,
        OQA_GLYPHS_3BIT_RECIPE,
        OQA_GLYPHS_2BIT_RECIPE,
        QFA_IMAGENET_RECIPE,
        QFA_GLYPHS_RECIPE,
        TINY_QFA_RECIPE,
        HAQ_IMAGENET_KMEANS_RECIPE,
        HAQ_IMAGENET_LINEAR_RECIPE,
    )
}
AT_BITS = {  # recipes of supernets at fewer bits, which start from one of more bits
    ("oqa-imagenet", 3): "oqa-imagenet-3bit",
    ("oqa-imagenet", 2): "oqa-imagenet-2bit",
    ("oqa-glyphs", 3): "oqa-glyphs-3bit",
    ("oqa-glyphs", 2): "oqa-glyphs-2bit",
}
FLOAT_FIRST = {
    "qfa-imagenet": "oqa-imagenet",
    "qfa-glyphs": "oqa-glyphs",
}  # recipe of a supernet of mixed precision -> that of the float supernet that it starts from


def get_recipe(name: str | None, spec: ImageSpec, *, in_float: bool = False) -> Recipe:
    """The recipe of this name, or by default that of a space or a model. UserError names the known ones.

    A space of one bit-width has the recipe for 4 bits if there is none for its own. With `in_float` it is the recipe of
    the float supernet from which a supernet of mixed precision starts.
    """
    known = ", ".join(RECIPES)
    if name is None:
        name = _own_recipe(spec)
        if name is None:
            raise UserError(f"{spec.name} has no training recipe of its own: give --recipe, one of {known}")
        name = FLOAT_FIRST.get(name, name) if in_float else name
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; known: {known}")
    return RECIPES[name]


def _own_recipe(spec: ImageSpec) -> str | None:
    """The recipe of a space, or of the preset with its name (files record no recipe), or of the data set."""
    if isinstance(spec, SearchSpace) and (space := spec if spec.recipe else find_preset(spec.name)):
        return AT_BITS.get((space.recipe, bits_throughout(space)), space.recipe)
    return DATASETS[spec.dataset].recipe if spec.dataset in DATASETS else None
