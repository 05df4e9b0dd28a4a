"""Channel rounding shared by the spaces, the networks and the cost model."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def make_divisible(value: ArrayLike, divisor: int = 8) -> np.ndarray:
    """Nearest multiple of `divisor` that is not more than 10 % below `value` (MobileNetV2's rule).

    >>> int(make_divisible(27)), int(make_divisible(11)), int(make_divisible(3))
    (32, 16, 8)
    """
    value = np.asarray(value, dtype=np.float64)
    rounded = np.maximum(divisor, np.floor(value + divisor / 2) // divisor * divisor)
    rounded = np.where(rounded < 0.9 * value, rounded + divisor, rounded)
    return rounded.astype(np.int64)
