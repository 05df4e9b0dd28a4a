"""Random changes of the colours of training images, as data. This module imports neither torch nor images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apq.errors import UserError

MOST_HUE = 0.5  # half of the circle of hues


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """How far the colours of an image change at random. UserError where a field is out of range.

    Brightness, contrast and saturation are multiplied by factors from 1 - x to 1 + x, but not below 0. The hue moves by
    at most `hue` of the circle of hues to either side. The four changes are made in random order.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        factors = (self.brightness, self.contrast, self.saturation)
        if not (all(0 <= amount < math.inf for amount in factors) and 0 <= self.hue <= MOST_HUE):
            raise UserError(f"a colour jitter needs amounts of at least 0 and a hue of at most {MOST_HUE}, not {self}")


STRONG = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
# Of once-for-all ("tf", the distort_color of train_ofa_net.py), of OQA (arXiv 2010.04354, A.2: [32/255, 0, 0.5, 0]) and
# of QFA (main.py).
ONCE_FOR_ALL = ColorJitter(brightness=32 / 255, saturation=0.5)
