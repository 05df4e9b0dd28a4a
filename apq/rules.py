"""What is legal beyond the choices themselves, and why."""

from __future__ import annotations

from apq.errors import UserError
from apq.space import SearchSpace


def check_block(space: SearchSpace, slot: int, kernel_size: int, bits: tuple[int, ...]) -> None:
    """UserError with the reason where a block's kernel and bits (one an operand kind) break a rule of the space."""
    for rule in space.forbidden:
        if space.breaks(rule, kernel_size, bits):
            raise UserError(
                f"slot {slot}: kernel {kernel_size} with {rule.operand} bits {rule.bits} is not allowed: {rule.reason}"
            )
