"""scikit-learn's handwritten digits (UCI, 1,797 images of 8x8 in 17 grey levels), the data set that is always there."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from apq.space import SearchSpace
from dataset.splits import Splits, TensorImages
from dataset.transforms import random_affine

SPLIT_SEED = 0  # the split is part of the data set, not of an experiment
N_VAL, N_TEST = 400, 400
MEAN, STD = 0.3053, 0.3760  # of all pixels, scaled to 0..1


def digits_splits(space: SearchSpace) -> Splits:
    """997 training, 400 validation and 400 test images, stratified by class, at the space's resolution and channels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    side = space.resolutions[-1]
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    images = ((images - MEAN) / STD).expand(-1, space.in_channels, -1, -1).contiguous()
    labels = torch.from_numpy(data.target)
    split = partial(train_test_split, random_state=SPLIT_SEED)
    rest, test = split(range(len(labels)), test_size=N_TEST, stratify=labels)
    train, val = split(rest, test_size=N_VAL, stratify=labels[rest])
    augment = partial(random_affine, degrees=12, shift=0.08, scale=0.12, shear=0.15)
    return Splits(
        train=TensorImages(images[train], labels[train], augment),
        calibration=TensorImages(images[train], labels[train]),
        val=TensorImages(images[val], labels[val]),
        test=TensorImages(images[test], labels[test]),
    )
