"""Pictures of files as pixels of one side, each cut from the whole picture: random crops, and central ones.

A crop is resized once, to the side that is asked. So an image at 160 pixels is not one of 224 that was resized again.
A JPEG file whose crop has many more pixels than are asked for is decoded at a half, a quarter or an eighth of its size,
which is faster: see `reduction`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling, Transpose
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2

from dataset.color_jitter import ColorJitter
from dataset.file_batches import normalised
from dataset.image_file import Picture
from dataset.table import PHOTOS

MEAN, STD = PHOTOS.mean, PHOTOS.std
CENTRAL = 0.875  # share of the shorter side that a central crop shows
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops: share of the picture, width / height
MARGIN = 3.0  # pixels a side that a reduced picture has at least for each one that is shown
REDUCTIONS = (8, 4, 2)


@dataclass(frozen=True)
class View(ABC):
    """How pictures become images of `side` pixels. Random numbers come from torch's global generator."""

    side: int

    @abstractmethod
    def pixels(self, picture: Picture) -> Tensor:
        """The bytes of the image: (3, side, side)."""

    def __call__(self, image: Image.Image) -> Tensor:
        """An image that is in memory, as networks get it: (3, side, side), normalised."""
        return normalised(self.pixels(Picture(image)))


@dataclass(frozen=True)
class CentralCrop(View):
    """See `central_crop`."""

    def pixels(self, picture: Picture) -> Tensor:
        width, height = picture.size
        short = math.ceil(self.side / CENTRAL)
        long = int(short * max(width, height) / min(width, height))
        size = (short, long) if width <= height else (long, short)
        whole = _resized(picture, (0, 0, width, height), size)
        left, top = (round((n - self.side) / 2) for n in size)
        return _as_tensor(whole.crop((left, top, left + self.side, top + self.side)))


@dataclass(frozen=True)
class RandomCrop(View):
    """See `random_crop`."""

    colours: v2.ColorJitter | None

    def pixels(self, picture: Picture) -> Tensor:
        width, height = picture.size
        alike = torch.empty((1, height, width), device="meta")  # the size is all that counts
        top, left, rows, columns = RandomResizedCrop.get_params(alike, list(AREA), list(ASPECT))
        image = _resized(picture, (left, top, left + columns, top + rows), (self.side, self.side))
        if torch.rand(1) < 0.5:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return _as_tensor(image if self.colours is None else self.colours(image))


@functools.cache
def central_crop(side: int) -> CentralCrop:
    """The shorter side becomes ceil(side / 0.875) pixels; then the middle is cut out.

    OQA (arXiv 2010.04354), appendix A.2, and once-for-all's images for evaluation.
    """
    return CentralCrop(side)


@functools.cache
def random_crop(side: int, color_jitter: ColorJitter | None = None) -> RandomCrop:
    """A random part, of 8 to 100 % of the area, often mirrored, in other colours.

    The same random numbers give the same part of the picture, the same mirroring and colours at every side.
    """
    return RandomCrop(side, None if color_jitter is None else jitter_transform(color_jitter))


def jitter_transform(color_jitter: ColorJitter) -> v2.ColorJitter:
    """The transform of a colour jitter. It draws from torch's global generator."""
    given = {"brightness": color_jitter.brightness, "contrast": color_jitter.contrast}
    return v2.ColorJitter(**given, saturation=color_jitter.saturation, hue=color_jitter.hue)


def reduction(shown: tuple[int, int], size: tuple[int, int]) -> int:
    """By how much the decoder may reduce a picture of which `shown` pixels (width, height) become `size`: 1, 2, 4 or 8.

    What it gives has at least `MARGIN` pixels a side for each one of the result, so that the resizing after it decides
    what is seen.

    >>> reduction((500, 375), (341, 256)), reduction((4000, 3000), (341, 256)), reduction((4000, 3000), (170, 128))
    (1, 2, 4)
    """
    spare = min(n / wanted for n, wanted in zip(shown, size, strict=True)) / MARGIN
    return next((k for k in REDUCTIONS if k <= spare), 1)


def _resized(picture: Picture, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """The pixels of a picture in a box (left, top, right, bottom), resized to `size`."""
    image, reduced = picture.decoded(reduction((box[2] - box[0], box[3] - box[1]), size))
    left, top, right, bottom = (edge / reduced for edge in box)
    whole = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))  # what is outside is not seen
    if whole != (0, 0, *image.size):
        image = image.crop(whole)
    inside = (left - whole[0], top - whole[1], right - whole[0], bottom - whole[1])
    return image.resize(size, Resampling.BILINEAR, box=inside)


def _as_tensor(image: Image.Image) -> Tensor:
    """The pixels of an RGB image: (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
