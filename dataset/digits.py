"""scikit-learn's handwritten digits (UCI): 1,797 images of 8x8 pixels in 17 grey levels, with nothing to download."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from apq.errors import UserError
from dataset.splits import ImageSpec, Splits, TensorImages
from dataset.table import DIGITS
from dataset.transforms import random_affine

N_CLASSES = 10
SPLIT_SEED = 0  # the split is part of the data set, not of an experiment
N_VAL, N_TEST = 400, 400
VAL_VIEWS = 4  # distorted views of each validation image, besides the image itself
(MEAN,), (STD,) = DIGITS.mean, DIGITS.std
NOISE = 0.5  # standard deviation, in units of STD


def distort(images: Tensor) -> Tensor:
    """Rotate, shift, scale and shear each image at random, and add noise: (N, C, H, W) -> same.

    Random numbers come from torch's global generator.
    """
    views = random_affine(images, degrees=25, shift=0.12, scale=0.2, shear=0.25)
    return views + NOISE * torch.randn_like(views)


def digits_splits(spec: ImageSpec) -> Splits:
    """997 training, 400 validation and 400 test digits, stratified by class, at the spec's resolution and channels.

    Training images are distorted anew each time. The validation split has 2,000 images: each digit undistorted and in 4
    fixed distorted views, because undistorted digits are too easy and too few to rank subnets. Test images are
    undistorted. UserError unless the spec has 10 classes.
    """
    if spec.n_classes != N_CLASSES:
        raise UserError(f"digits have {N_CLASSES} classes; {spec.name} has {spec.n_classes}")
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    side = spec.resolutions[-1]
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    images = ((images - MEAN) / STD).expand(-1, spec.in_channels, -1, -1).contiguous()
    labels = torch.from_numpy(data.target)
    split = partial(train_test_split, random_state=SPLIT_SEED)
    rest, test = split(range(len(labels)), test_size=N_TEST, stratify=labels)
    train, val = split(rest, test_size=N_VAL, stratify=labels[rest])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SPLIT_SEED)
        calibration = distort(images[train])
        val_images = torch.cat([images[val], *(distort(images[val]) for _ in range(VAL_VIEWS))])
    return Splits(
        train=TensorImages(images[train], labels[train], distort),
        calibration=TensorImages(calibration, labels[train]),
        val=TensorImages(val_images, labels[val].repeat(1 + VAL_VIEWS)),
        test=TensorImages(images[test], labels[test]),
        source={"dataset": "digits"},
    )
