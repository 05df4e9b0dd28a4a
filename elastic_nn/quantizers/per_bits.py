"""A quantizer for each bit-width of one operand, for supernets of mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apq.errors import UserError
from elastic_nn.quantizers.base import Quantizer

BITS = tuple(range(2, 9))


class PerBits(Quantizer):
    """Holds a quantizer for each bit-width, made by `make`. `bits` chooses the active one."""

    def __init__(self, make: Callable[[], Quantizer], choices: Sequence[int] = BITS) -> None:
        by_bits = {str(bits): make() for bits in choices}
        super().__init__(signed=by_bits[str(choices[-1])].signed)
        self.of_bits = nn.ModuleDict(by_bits)
        for bits, quantizer in by_bits.items():
            quantizer.bits = int(bits)
        self.bits = choices[-1]

    @property
    def active(self) -> Quantizer:
        """The quantizer of the present bits. UserError if there is none."""
        if (key := str(self.bits)) not in self.of_bits:
            raise UserError(f"no quantizer of {self.bits} bits; there are {', '.join(self.of_bits)}")
        return self.of_bits[key]

    def quantize(self, v: Tensor) -> Tensor:
        return self.active(v)

    def calibrate(self, v: Tensor) -> None:
        """Calibrate the quantizers of all bit-widths. Calls are combined as by those quantizers."""
        for quantizer in self.of_bits.values():
            quantizer.calibrate(v)

    def forget(self) -> None:
        for quantizer in self.of_bits.values():
            quantizer.forget()

    def invalidate(self) -> None:
        for quantizer in self.of_bits.values():
            quantizer.invalidate()

    def inherit(self, from_bits: int, to_bits: int) -> None:
        """Nothing to do: each bit-width has a range of its own."""

    def restrict(self, choices: Collection[int]) -> None:
        """Drop the quantizers of other bit-widths."""
        for bits in [key for key in self.of_bits if int(key) not in choices]:
            del self.of_bits[bits]

    def learned_parameters(self) -> list[nn.Parameter]:
        return [parameter for quantizer in self.of_bits.values() for parameter in quantizer.learned_parameters()]

    def relative_parameters(self) -> dict[nn.Parameter, float]:
        return {p: usual for part in self.of_bits.values() for p, usual in part.relative_parameters().items()}

    @property
    def needs_statistics(self) -> bool:
        return any(quantizer.needs_statistics for quantizer in self.of_bits.values())

    @property
    def data_dependent(self) -> tuple[str, ...]:
        return tuple(
            f"{prefix}{name}" for prefix, quantizer in self._prefixed().items() for name in quantizer.data_dependent
        )

    def check_state(self, state: Mapping[str, Any], shape: torch.Size | None) -> None:
        """See `Quantizer`. The state must fit the quantizers of all bit-widths."""
        for prefix, quantizer in self._prefixed().items():
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            quantizer.check_state(own, shape)

    def _prefixed(self) -> dict[str, Quantizer]:
        """The quantizers by the prefixes of their keys in the state dict."""
        return {f"of_bits.{bits}.": quantizer for bits, quantizer in self.of_bits.items()}

    @property
    def started(self) -> bool:
        return any(quantizer.started for quantizer in self.of_bits.values())

    @property
    def code_range(self) -> tuple[int, int]:
        return self.active.code_range

    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.active.scale_and_zero_point(v)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
