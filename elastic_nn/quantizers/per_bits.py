"""A quantizer for each bit-width of one operand, for supernets of mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from apq.errors import UserError
from elastic_nn.quantizers.alternatives import Alternatives
from elastic_nn.quantizers.base import Quantizer

BITS = tuple(range(2, 9))


class PerBits(Alternatives):
    """Holds a quantizer for each bit-width, made by `make`. `bits` chooses the active one."""

    def __init__(self, make: Callable[[], Quantizer], choices: Sequence[int] = BITS) -> None:
        by_bits = {str(bits): make() for bits in choices}
        super().__init__(signed=by_bits[str(choices[-1])].signed)
        self.of_bits = nn.ModuleDict(by_bits)
        for bits, quantizer in by_bits.items():
            quantizer.bits = int(bits)
        self.bits = choices[-1]

    @property
    def parts(self) -> nn.ModuleDict:
        return self.of_bits

    @property
    def active(self) -> Quantizer:
        """The quantizer of the present bits. UserError if there is none."""
        if (key := str(self.bits)) not in self.of_bits:
            raise UserError(f"no quantizer of {self.bits} bits; there are {', '.join(self.of_bits)}")
        return self.of_bits[key]

    def calibrate(self, v: Tensor) -> None:
        """Calibrate the quantizers of all bit-widths. Calls are combined as by those quantizers."""
        for quantizer in self.of_bits.values():
            quantizer.calibrate(v)

    def inherit(self, from_bits: int, to_bits: int) -> None:
        """Nothing to do: each bit-width has a range of its own."""

    def restrict(self, choices: Collection[int]) -> None:
        """Drop the quantizers of other bit-widths."""
        for bits in [key for key in self.of_bits if int(key) not in choices]:
            del self.of_bits[bits]
