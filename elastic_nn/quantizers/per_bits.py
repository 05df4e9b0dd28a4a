"""One quantizer for each number of bits, over one shared tensor: what a mixed-precision supernet needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from apq.errors import UserError
from apq.space import FULL_PRECISION

BITS = tuple(range(2, 9))


class PerBits(nn.Module):
    """A quantizer of each number of bits, made by one call; `bits` says which of them works, FULL_PRECISION: none.

    `bits` and `enabled` (False: pass through unquantized) are run-time state.
    """

    def __init__(self, make: Callable[[], nn.Module], choices: Sequence[int] = BITS) -> None:
        super().__init__()
        self.of_bits = nn.ModuleDict({str(bits): make() for bits in choices})
        for bits, quantizer in zip(choices, self.of_bits.values(), strict=True):
            quantizer.bits = bits
        self.bits, self.enabled = choices[-1], True

    def forward(self, v: Tensor) -> Tensor:
        if not self.enabled or self.bits == FULL_PRECISION:
            return v
        if (key := str(self.bits)) not in self.of_bits:
            raise UserError(f"no quantizer of {self.bits} bits; there are {', '.join(self.of_bits)}")
        return self.of_bits[key](v)

    def restrict(self, choices: Collection[int]) -> None:
        """Drop the quantizers of other numbers of bits."""
        for bits in [key for key in self.of_bits if int(key) not in choices]:
            del self.of_bits[bits]

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Start the quantizers of all bits from these values."""
        for quantizer in self.of_bits.values():
            quantizer.calibrate(v)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
