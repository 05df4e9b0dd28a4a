"""Training recipes as data: supernet, finetune and pair gathering for each space."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from apq.bit_widths import BITS_SUFFIX
from apq.errors import UserError
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


def _sandwich(train: TrainConfig, epoch_images: int | None = None) -> Phase:
    """All sizes at once: the largest, the smallest and two random subnets a step."""
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


# OQA (arXiv 2010.04354): epochs, images a step, learning rates of 3 and 2 bits, and images of recalibration are the
# paper's. Ours are the learning rates at 4 bits, once-for-all's of its first and last phases for half as many images a
# step, and all about predictors, which OQA does without.
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

# The same for glyphs on one CPU core: minutes instead of GPU weeks.
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
    """QFA's two stages: full precision is among the choices of bits, then no longer. Four random subnets a step."""
    both = {"elastic": ("ks", "d", "e", "bits"), "subnets_per_step": 6, "sandwich": True, "epoch_images": epoch_images}
    return (
        Phase(name="bits and float", train=with_float, float_share=1 / 4, **both),
        Phase(name="bits", train=bits, **both),
    )


# QFA (arXiv 2105.08952): epochs, learning rate (2.5e-3 for every 64 images) and weight decay are the paper's; 1,024
# images a step, and what is said of pairs, are ours.
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
    )
}
SHARED_RECIPES = {  # of spaces that share one; with a number of bits behind the name where that has its own
    "oqa-mbv2": "oqa-imagenet",
    "oqa-mbv3": "oqa-imagenet",
    "oqa-mbv2-glyphs": "oqa-glyphs",
    "oqa-mbv3-glyphs": "oqa-glyphs",
    "qfa-mbv3": "qfa-imagenet",
    "qfa-mbv3-glyphs": "qfa-glyphs",
}
FLOAT_FIRST = {"qfa-imagenet": "oqa-imagenet", "qfa-glyphs": "oqa-glyphs"}  # how their float supernets are trained


def get_recipe(name: str | None, spec: ImageSpec, *, in_float: bool = False) -> Recipe:
    """A recipe by name; None: that of the space (or model), else of its images. UserError names the known ones.

    A space of one bit-width without a recipe for that many is trained by the one for 4. `in_float`: one of mixed
    precision, for the float supernet that its own starts from.
    """
    known = ", ".join(RECIPES)
    if name is None:
        name = next((known for known in (*_own_recipes(spec), spec.dataset) if known in RECIPES), "")
        if not name:
            raise UserError(f"{spec.name} has no training recipe of its own: give --recipe, one of {known}")
        name = FLOAT_FIRST.get(name, name) if in_float else name
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; known: {known}")
    return RECIPES[name]


def _own_recipes(spec: ImageSpec) -> tuple[str, ...]:
    """What the recipe of a space's own may be called, best first."""
    base = BITS_SUFFIX.sub("", spec.name)
    shared = SHARED_RECIPES.get(base, "")
    return spec.name, shared + spec.name.removeprefix(base), shared
