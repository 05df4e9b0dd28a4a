"""Operands whose bits are chosen: operand kinds of the elastic blocks, and operands of shared layers."""

from __future__ import annotations

from dataclasses import dataclass

from apq.errors import UserError

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
        if not self.layers or set(self.layers) - set(BLOCK_LAYERS) or self.operand not in ("w", "a"):
            raise UserError(f"operand kind {self.name}: layers are {BLOCK_LAYERS}, operands 'w' and 'a'")
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            raise UserError(f"operand kind {self.name}: choices {self.choices} must be ascending and distinct")
        check_whole(f"operand kind {self.name}", lowest=2, choices=self.choices)

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
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            raise UserError(f"shared operand {self.layer}: choices {self.choices} must be ascending and distinct")
        check_whole(f"shared operand {self.layer}", lowest=2, choices=self.choices)


@dataclass(frozen=True, kw_only=True)
class Forbidden:
    """A rule: no block may combine this depthwise kernel size with this bit-width of an operand kind."""

    kernel_size: int
    operand: str
    bits: int
    reason: str


def check_whole(owner: str, lowest: int = 1, **values: int | tuple[int, ...]) -> None:
    """Check that every value, or every item of a tuple, is an integer of at least `lowest`; UserError if not."""
    for what, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int) or isinstance(number, bool) or number < lowest:
                raise UserError(f"{owner}: {what} must be whole and at least {lowest}, not {number!r}")
