"""Stages and slots: where the elastic blocks of a network are, and which channels they may have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from apq.errors import UserError
from apq.limits import MOST_SLOTS, MOST_STRIDE
from apq.operands import check_ascending, check_whole

ACTIVATIONS = ("relu6", "relu", "h_swish")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive blocks of one output width. The first has the stride.

    With `squeeze` the blocks have squeeze-and-excitation after the depthwise layer. UserError where a field is out of
    range.
    """

    width: int
    stride: int
    depths: tuple[int, ...]
    squeeze: bool = False
    activation: str = "relu6"

    def __post_init__(self) -> None:
        check_ascending("stage", depths=self.depths)
        check_whole("stage", highest=MOST_SLOTS, depths=self.depths)
        check_whole("stage", width=self.width)
        check_whole("stage", highest=MOST_STRIDE, stride=self.stride)
        check_activation("stage", self.activation)
        if not isinstance(self.squeeze, bool):
            raise UserError(f"stage: squeeze must be true or false, not {self.squeeze!r}")


@dataclass(frozen=True)
class Slot:
    """One place for an elastic block, at `position` in its stage. `mid_channels` are its choices, ascending."""

    index: int
    stage: int
    position: int
    in_channels: int
    out_channels: int
    stride: int
    mid_channels: tuple[int, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """`mid_channels` as the expansions `e` of a published spec."""
        return tuple(mid / self.in_channels for mid in self.mid_channels)

    def runs_at(self, depths: tuple[int, ...]) -> bool:
        """Whether it runs in a network with these stage depths."""
        return self.position < depths[self.stage]

    def channels_at(self, ratio: float) -> int:
        """Mid channels at one of `ratios`."""
        return round(ratio * self.in_channels)


def make_divisible(value: ArrayLike, divisor: int = 8) -> np.ndarray:
    """Round to the nearest multiple of `divisor`, but not down by more than 10 % (MobileNetV2's rule).

    >>> int(make_divisible(27)), int(make_divisible(11)), int(make_divisible(3))
    (32, 16, 8)
    """
    value = np.asarray(value, dtype=np.float64)
    rounded = np.maximum(divisor, np.floor(value + divisor / 2) // divisor * divisor)
    rounded = np.where(rounded < 0.9 * value, rounded + divisor, rounded)
    return rounded.astype(np.int64)


def check_activation(owner: str, name: str) -> None:
    """Check that an activation is known; UserError if not."""
    if name not in ACTIVATIONS:
        raise UserError(f"{owner}: activation {name!r}; known: {', '.join(ACTIVATIONS)}")
