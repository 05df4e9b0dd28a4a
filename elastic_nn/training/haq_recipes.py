"""The recipes of HAQ (Wang et al., CVPR 2019) for ImageNet: its episodes, and the finetune of what they find.

Numbers are from its code, https://github.com/mit-han-lab/haq; each has the file that it is from beside it. That code
has neither label smoothing nor clipped gradients, and its momentum is not Nesterov's (`torch.optim.SGD`, momentum 0.9,
in all its files). It has no supernets and no predictors: numbers of those are APQ's, to complete the recipe.

Four things differ. Its weight decay is also of norms and biases. Its cosine falls once an epoch. Layers with more than
64 centroids (k-means at 7 and 8 bits) train freely there, as single weights, in finetunes and in episodes
(`free_high_bit` of `kmeans_update_model`), and all layers are clustered anew before the last epoch of a finetune; here
the weights of every layer stay in their clusters. Its MobileNetV2 (models/mobilenetv2.py) has no dropout; that of
torchvision, which is trained here, keeps its dropout of 0.2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from apq.policy import LINEAR_PUBLISHED, QUANTIZERS
from elastic_nn.training.recipe import NO_CLIP, Phase, Recipe, TrainConfig

if TYPE_CHECKING:
    from dataset.splits import ImageSpec


def _plain(**settings: float | str) -> TrainConfig:
    """Plain SGD with momentum, as all trainings in HAQ's code."""
    return TrainConfig(momentum=0.9, nesterov=False, label_smoothing=0.0, clip_norm=NO_CLIP, **settings)


def _episode(batch_size: int) -> TrainConfig:
    """The finetune of an episode. Epochs, learning rate and its decay are defaults of rl_quantize.py."""
    return _plain(
        epochs=1,  # rl_quantize.py, --finetune_epoch
        lr=0.001,  # rl_quantize.py, --finetune_lr
        schedule="exponential",
        gamma=0.8,  # rl_quantize.py, --finetune_gamma, after each epoch
        weight_decay=4e-5,  # lib/env/*_env.py, reset()
        batch_size=batch_size,
    )


HAQ_IMAGENET_KMEANS_RECIPE = Recipe(
    name="haq-imagenet-kmeans",
    color_jitter=None,  # lib/utils/data_utils.py
    phases=(
        Phase(  # the float network, by train.py here and by pretrain.py there: run/run_pretrain.sh
            name="largest", elastic=(), train=_plain(epochs=150, lr=0.05, batch_size=256, weight_decay=4e-5)
        ),
    ),
    # run/run_kmeans_quantize_finetune.sh; the weight decay is the default of finetune.py, the schedule its --lr_type
    finetune=_plain(epochs=100, lr=0.01, batch_size=256, weight_decay=1e-5),
    episode_finetune=_episode(batch_size=256),  # run/run_kmeans_quantize_search.sh, --data_bsize
    episode_images=20_000,  # run/run_kmeans_quantize_search.sh, --train_size
    episode_val_images=10_000,  # the same, --val_size
    reward="validation",  # lib/env/quantize_env.py, step()
    # APQ's, for what HAQ does not have.
    pair_finetune=_plain(epochs=1, lr=0.001, batch_size=256, weight_decay=4e-5),
    recalibration_images=2000,
    pairs_float=80_000,
    pairs_quant=5_000,
    quantizer=LINEAR_PUBLISHED,
)

HAQ_IMAGENET_LINEAR_RECIPE = replace(
    HAQ_IMAGENET_KMEANS_RECIPE,
    name="haq-imagenet-linear",
    finetune=_plain(epochs=30, lr=0.01, batch_size=256, weight_decay=4e-5),  # run/run_linear_quantize_finetune.sh
    episode_finetune=_episode(batch_size=128),  # run/run_linear_quantize_search.sh, --data_bsize
    reward="training",  # lib/env/linear_quantize_env.py, step(): what _finetune() returns
)


def haq_recipe_of(spec: ImageSpec, quantizer: str) -> str | None:
    """The name of HAQ's recipe for bits of a network of ImageNet's images; None for other networks."""
    if spec.dataset != "imagenet":
        return None
    weights_only = QUANTIZERS[quantizer].weights_only
    return (HAQ_IMAGENET_KMEANS_RECIPE if weights_only else HAQ_IMAGENET_LINEAR_RECIPE).name
