"""The recipes of OQA (arXiv 2010.04354, appendix A.2), and small counterparts for glyphs."""

from __future__ import annotations

from dataclasses import replace

from elastic_nn.training.apq_recipes import APQ_IMAGENET_RECIPE, GLYPHS_RECIPE, TINY_RECIPE, published_phases
from elastic_nn.training.recipe import NO_CLIP, Phase, TrainConfig

DROPOUT = 0.1  # "quantization aware training", kept "in the OQA procedure", as are Nesterov's momentum and the cosine


def _sandwich(train: TrainConfig, epoch_images: int | None = None) -> Phase:
    """A phase by the sandwich rule: the largest, the smallest and two random subnets a step ("OQA procedure", step 1).

    Each has a resolution of its own. What the teacher sees is not published: here the images at the largest one.
    """
    return Phase(
        name="sandwich",
        elastic=("resolution", "ks", "d", "e"),
        train=train,
        subnets_per_step=4,
        sandwich=True,
        own_resolutions=True,
        epoch_images=epoch_images,
    )


def _largest(train: TrainConfig, *elastic: str) -> Phase:
    """The phase of the largest subnet alone, at the largest resolution (step 0) unless "resolution" is elastic."""
    return Phase(name="largest", elastic=elastic, train=train, own_resolutions=True)


def _imagenet(epochs: int, lr: float) -> TrainConfig:
    """Settings of all trainings ("Quantization aware training", "Knowledge distillation"); none clips gradients."""
    return TrainConfig(
        epochs=epochs,
        lr=lr,
        batch_size=1024,
        weight_decay=3e-5,
        label_smoothing=0.1,
        kd_ratio=1.0,
        dropout=DROPOUT,
        clip_norm=NO_CLIP,
    )


# The float supernet that the 4-bit one starts from: once-for-all's, by its own schedule and with its dropout.
OQA_IMAGENET_FLOAT_RECIPE = replace(
    APQ_IMAGENET_RECIPE,
    name="oqa-imagenet-float",
    phases=tuple(replace(phase, train=replace(phase.train, dropout=DROPOUT)) for phase in published_phases()),
    recalibration_images=4096,
    epoch_val_images=10_000,
)
# Step 0 trains the largest subnet for 150 epochs at 0.04, step 1 all subnets for 200 epochs at 0.02, step 2 those of 3
# bits for 25 epochs at 0.0016, step 3 those of 2 bits for 120 epochs at 0.0256. BatchNorm is recalibrated on 4,096
# images (section 3.4).
# The settings of predictors are ours: OQA has none.
OQA_IMAGENET_RECIPE = replace(
    OQA_IMAGENET_FLOAT_RECIPE,
    name="oqa-imagenet",
    phases=(_largest(_imagenet(150, 0.04)), _sandwich(_imagenet(200, 0.02))),
    finetune=_imagenet(25, 0.0016),  # "OQA subnet finetuning"
)
OQA_IMAGENET_3BIT_RECIPE = replace(
    OQA_IMAGENET_RECIPE, name="oqa-imagenet-3bit", phases=(_sandwich(_imagenet(25, 0.0016)),)
)
OQA_IMAGENET_2BIT_RECIPE = replace(
    OQA_IMAGENET_RECIPE, name="oqa-imagenet-2bit", phases=(_sandwich(_imagenet(120, 0.0256)),)
)


def _glyphs(epochs: int, lr: float, warmup_epochs: int = 0) -> TrainConfig:
    return TrainConfig(epochs=epochs, lr=lr, warmup_epochs=warmup_epochs, dropout=DROPOUT)


# The same for glyphs, in minutes on one CPU core. Epochs and learning rates are ours.
OQA_GLYPHS_FLOAT_RECIPE = replace(
    GLYPHS_RECIPE,
    name="oqa-glyphs-float",
    phases=(
        _largest(_glyphs(16, 0.3, warmup_epochs=1), "resolution"),  # as once-for-all's largest network
        _sandwich(_glyphs(12, 0.1), epoch_images=10_000),
    ),
    epoch_val_images=1000,
)
OQA_GLYPHS_RECIPE = replace(
    OQA_GLYPHS_FLOAT_RECIPE,
    name="oqa-glyphs",
    phases=(_largest(_glyphs(4, 0.05)), _sandwich(_glyphs(8, 0.05), epoch_images=10_000)),
)
OQA_GLYPHS_3BIT_RECIPE = replace(
    OQA_GLYPHS_RECIPE, name="oqa-glyphs-3bit", phases=(_sandwich(_glyphs(4, 0.05), epoch_images=10_000),)
)
OQA_GLYPHS_2BIT_RECIPE = replace(
    OQA_GLYPHS_RECIPE, name="oqa-glyphs-2bit", phases=(_sandwich(_glyphs(6, 0.05), epoch_images=10_000),)
)

TINY_SANDWICH_RECIPE = replace(
    TINY_RECIPE,
    name="tiny-sandwich",
    phases=(TINY_RECIPE.phases[0], _sandwich(TrainConfig(epochs=1, lr=0.05), epoch_images=256)),
    epoch_val_images=64,
)
