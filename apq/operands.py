"""Operands whose bits are chosen: operand kinds of the elastic blocks, and operands of shared layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apq.bounds import is_number, is_whole
from apq.errors import UserError
from apq.limits import MOST_BITS, MOST_CHANNELS, MOST_CHOICES

BLOCK_LAYERS = ("expand", "depthwise", "project")
SHARED_LAYERS = ("blocks.0.depthwise", "blocks.0.project", "feature_mix_layer", "pooled_mix_layer")


@dataclass(frozen=True, kw_only=True)
class OperandBits:
    """Bit choices of one operand kind, for example the weights ("w") of a block's expand and project layers.

    `choices` are ascending. UserError for unknown layers and bad choices.
    """

    name: str
    layers: tuple[str, ...]
    operand: str
    choices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"an operand kind's name must be a non-empty string, not a {type(self.name).__name__}")
        if not self.layers or set(self.layers) - set(BLOCK_LAYERS) or self.operand not in ("w", "a"):
            raise UserError(f"operand kind {self.name}: layers are {BLOCK_LAYERS}, operands 'w' and 'a'")
        check_ascending(f"operand kind {self.name}", choices=self.choices)
        check_whole(f"operand kind {self.name}", 2, MOST_BITS, choices=self.choices)

    @property
    def setting(self) -> str:
        """The key of this kind's list in a published policy, for example `pw_w_bits_setting`."""
        return f"{self.name}_bits_setting"


@dataclass(frozen=True, kw_only=True)
class SharedOperand:
    """Bit choices of the weights ("w") or the inputs ("a") of a shared layer, one of `SHARED_LAYERS`.

    Every subnet of the space has the layer; its bits may differ between subnets.
    """

    layer: str
    operand: str
    choices: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.layer not in SHARED_LAYERS or self.operand not in ("w", "a"):
            raise UserError(
                f"shared operand {self.layer} {self.operand}: layers are {SHARED_LAYERS}, operands 'w', 'a'"
            )
        check_ascending(f"shared operand {self.layer}", choices=self.choices)
        check_whole(f"shared operand {self.layer}", 2, MOST_BITS, choices=self.choices)


@dataclass(frozen=True, kw_only=True)
class Forbidden:
    """A rule: no block may combine this depthwise kernel size with this bit-width of an operand kind."""

    kernel_size: int
    operand: str
    bits: int
    reason: str


def check_ascending(owner: str, **choices: tuple[float, ...]) -> None:
    """Check that there are choices, ascending, distinct and not too many; UserError if not."""
    for what, values in choices.items():
        if len(values) > MOST_CHOICES:
            raise UserError(f"{owner}: {what} must be at most {MOST_CHOICES} choices, not {len(values)}")
        if not all(is_number(value) for value in values):
            raise UserError(f"{owner}: {what} must be numbers")
        if not values or list(values) != sorted(set(values)):
            raise UserError(f"{owner}: {what} {values} must be ascending and distinct")


def check_whole(owner: str, lowest: int = 1, highest: int = MOST_CHANNELS, **values: int | tuple[int, ...]) -> None:
    """Check that every value, or every item of a tuple, is an integer from `lowest` to `highest`; UserError if not."""
    for what, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if is_whole(number, highest + 1, math.inf):
                raise UserError(f"{owner}: {what} must be at most {highest}, not {_shown(number)}")
            if not is_whole(number, lowest, highest):
                raise UserError(f"{owner}: {what} must be whole and at least {lowest}, not {number!r}")


def _shown(number: int) -> str:
    return str(number) if number < 1 << 64 else "a number of more than 64 bits"
