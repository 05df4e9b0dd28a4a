"""The recipes of QFA (Bai et al., NeurIPS 2021, arXiv 2105.08952), and small counterparts for glyphs.

Numbers of the published code are those of apple/ml-batchquant, `main.py`, `get_args`, and of its training loop. Five
things differ. There each GPU has BatchNorm and ranges of its own 64 images; here BatchNorm is that of the whole batch,
and ranges are averaged over processes (with `--accumulate`, over parts of 64 images a process). There weight decay is
also of kernel transforms. There each subnet's images are cut from the picture; here they are resized from the largest.
There gradients are clipped to 500 before GPUs exchange them (`clip_grad_norm_` comes before the `step` of Horovod's
optimizer, which waits for them), so each GPU may clip those of its 64 images; here the norm is that of the gradient of
all 2,048 images. There statistics are recalibrated on random crops with other colours, as in training
(`build_sub_train_loader`); here on central crops, as images are evaluated.
"""

from __future__ import annotations

from dataclasses import replace

from apq.strata import PairStrata
from elastic_nn.training.oqa_recipes import OQA_GLYPHS_RECIPE, OQA_IMAGENET_RECIPE, TINY_SANDWICH_RECIPE
from elastic_nn.training.recipe import OutlierRule, Phase, TrainConfig

FLOAT_SHARE = 1 / 4  # full precision is one of four bit-widths in the first phase: 2, 3, 4, 32
SUBNETS = 6  # a step: both ends of the sandwich and four random subnets


def _phases(with_float: TrainConfig, bits: TrainConfig, epoch_images: int | None = None) -> tuple[Phase, ...]:
    """The two phases of the published training. In the first, full precision is one of the choices of bits."""
    first = Phase(
        name="bits and float",
        elastic=("resolution", "ks", "d", "e", "bits"),
        train=with_float,
        subnets_per_step=SUBNETS,
        sandwich=True,
        random_ends=True,
        float_share=FLOAT_SHARE,
        own_resolutions=True,
        teacher_follows=True,
        epoch_images=epoch_images,
    )
    return first, replace(first, name="bits", train=bits, float_share=0.0)


def _imagenet(epochs: int) -> TrainConfig:
    """Settings of a phase: 2.5e-3 for every 64 images, on 32 GPUs of 64 images each (README of the published code)."""
    return TrainConfig(
        epochs=5 + epochs,
        warmup_epochs=5,
        warmup_lr=2.5e-3,
        lr=32 * 2.5e-3,
        batch_size=32 * 64,
        momentum=0.9,
        weight_decay=3e-5,
        label_smoothing=0.1,
        kd_ratio=1.0,
        clip_norm=500.0,
        clip_together=True,
        dropout=0.1,
    )


# (5 + 60) + (5 + 120) = 190 epochs. 16,000 pairs and a predictor of three layers of 600: section 3.4 of the paper and
# `nsgaii_search.py`. Nothing is finetuned; the finetunes, if they are asked for, are OQA's and APQ's.
QFA_IMAGENET_RECIPE = replace(
    OQA_IMAGENET_RECIPE,
    name="qfa-imagenet",
    phases=_phases(_imagenet(60), _imagenet(120)),
    recalibration_images=64 * 30,  # a GPU; `RunManager.reset_running_statistics`
    pairs_quant=16_000,
    pair_strata=PairStrata(),  # `collect_network_info.py`
    pair_outliers=OutlierRule(),  # `nsgaii_search.py`
    predictor_hidden=600,
    supernet_quantizer="batchquant-published",
)


def _glyphs(epochs: int) -> TrainConfig:
    return TrainConfig(epochs=1 + epochs, warmup_epochs=1, lr=0.02, clip_norm=5.0, clip_together=True, dropout=0.1)


# The same for glyphs. Epochs, images and the learning rate are ours. The rate is 8 times the published one for every
# 64 images, and gradients are clipped harder: at 20 times it training diverged with 500, and was unstable with 5.
QFA_GLYPHS_RECIPE = replace(
    OQA_GLYPHS_RECIPE,
    name="qfa-glyphs",
    phases=_phases(_glyphs(8), _glyphs(20), epoch_images=8000),
    pairs_quant=600,
    pair_strata=PairStrata(),  # without a rule of outliers: so few pairs are thin at the cheap end, which it would drop
    predictor_hidden=600,
)
TINY_QFA_RECIPE = replace(
    TINY_SANDWICH_RECIPE,
    name="tiny-qfa",
    phases=_phases(TrainConfig(epochs=1, lr=0.05), TrainConfig(epochs=1, lr=0.05), epoch_images=128),
)
