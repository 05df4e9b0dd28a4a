"""The recipes of APQ: of the small data sets, of ImageNet as published, and one to try a setup."""

from __future__ import annotations

from dataclasses import replace

from apq.policy import LINEAR_PUBLISHED
from dataset.color_jitter import ONCE_FOR_ALL
from elastic_nn.training.recipe import NO_CLIP, Phase, Recipe, TrainConfig


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

# Fashion-MNIST has nearly three times the images of glyphs, and is easier.
FASHION_RECIPE = replace(
    GLYPHS_RECIPE,
    name="fashion",
    phases=_phases(
        {
            "largest": TrainConfig(epochs=12, lr=0.1, warmup_epochs=1),
            "kernel": TrainConfig(epochs=2, lr=0.05),
            "depth": TrainConfig(epochs=3, lr=0.05),
            "width": TrainConfig(epochs=7, lr=0.05),
        }
    ),
    pair_epoch_images=4000,
    predictor="kernel",
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


def published_phases() -> tuple[Phase, ...]:
    """Once-for-all's schedule (ICLR 2020, section 4.1): batch size 2,048 on 32 GPUs.

    Depths and mid channels become elastic in two phases: first down to the middle choice, then to the smallest. Numbers
    of the phases after the first are those of train_ofa_net.py in https://github.com/mit-han-lab/once-for-all: rates
    are 32 times its `base_lr`, and warm-up begins at `base_lr` itself (its `warmup_lr` of -1). That of the largest
    network begins at 0, the default of its `DistributedRunManager.train`. No gradient is clipped.

    Dropout is left at 0, as in APQ's networks. Once-for-all has 0.1.
    """

    def train(epochs: int, lr: float, warmup_epochs: int = 0, warmup_lr: float = 0.0) -> TrainConfig:
        return _published(
            epochs=epochs,
            lr=lr,
            batch_size=2048,
            weight_decay=3e-5,
            warmup_epochs=warmup_epochs,
            warmup_lr=warmup_lr,
        )

    depth, width = ("ks", "d"), ("ks", "d", "e")
    return (
        Phase(name="largest", elastic=(), train=train(180, 2.6, 5)),
        Phase(name="kernel", elastic=("ks",), train=train(125, 0.96, 5, 0.03)),
        Phase(name="depth-1", elastic=depth, train=train(25, 0.08), subnets_per_step=2, reach=2 / 3),
        Phase(name="depth-2", elastic=depth, train=train(125, 0.24, 5, 0.0075), subnets_per_step=2),
        Phase(name="width-1", elastic=width, train=train(25, 0.08), subnets_per_step=4, reach=2 / 3),
        Phase(name="width-2", elastic=width, train=train(125, 0.24, 5, 0.0075), subnets_per_step=4),
    )


def _published(**settings: float) -> TrainConfig:
    """Settings of a training in the code of once-for-all or APQ: neither clips gradients."""
    return TrainConfig(clip_norm=NO_CLIP, label_smoothing=0.1, **settings)


# The published numbers, for ImageNet on a cluster. Finetune: quant_aware.py and ImagenetRunConfig of APQ's code.
APQ_IMAGENET_RECIPE = Recipe(
    name="apq-imagenet",
    phases=published_phases(),
    pair_finetune=_published(epochs=1, lr=1e-3, batch_size=256, weight_decay=4e-5),
    pair_epoch_images=256_000,  # a fifth of ImageNet, because there are 5,000 pairs
    finetune=_published(epochs=30, lr=1e-3, batch_size=256, weight_decay=4e-5),
    recalibration_images=2000,
    pairs_float=80_000,
    pairs_quant=5_000,
    episode_images=20_000,  # as in HAQ's code
    episode_val_images=10_000,
    quantizer=LINEAR_PUBLISHED,
    color_jitter=ONCE_FOR_ALL,
)
