"""Pictures of files as tensors of one side, each cut from the whole picture: random crops, and central ones.

A crop is resized once, to the side that is asked. So an image at 160 pixels is not one of 224 that was resized again.
"""

from __future__ import annotations

import functools
import math

import torch
from torchvision.transforms import v2

from dataset.color_jitter import ColorJitter
from dataset.table import PHOTOS

MEAN, STD = PHOTOS.mean, PHOTOS.std
CENTRAL = 0.875  # share of the shorter side that a central crop shows


@functools.cache
def central_crop(side: int) -> v2.Compose:
    """The shorter side becomes ceil(side / 0.875) pixels; then the middle is cut out: (3, side, side), normalised.

    OQA (arXiv 2010.04354), appendix A.2, and once-for-all's images for evaluation.
    """
    return v2.Compose([v2.Resize(math.ceil(side / CENTRAL)), v2.CenterCrop(side), *_to_tensor()])


@functools.cache
def random_crop(side: int, color_jitter: ColorJitter | None = None) -> v2.Compose:
    """A random part, of 8 to 100 % of the area, often mirrored, in other colours: (3, side, side), normalised.

    The same random numbers give the same part of the picture, the same mirroring and colours at every side.
    """
    colours = [] if color_jitter is None else [jitter_transform(color_jitter)]
    return v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), *colours, *_to_tensor()])


def jitter_transform(color_jitter: ColorJitter) -> v2.ColorJitter:
    """The transform of a colour jitter. It draws from torch's global generator."""
    given = {"brightness": color_jitter.brightness, "contrast": color_jitter.contrast}
    return v2.ColorJitter(**given, saturation=color_jitter.saturation, hue=color_jitter.hue)


def _to_tensor() -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
