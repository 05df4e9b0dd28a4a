"""Quantizers that hold several quantizers of one operand, of which one is active."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elastic_nn.quantizers.base import Quantizer, Rounding


class Alternatives(Quantizer):
    """Holds the quantizers of one operand under their keys in `parts`. `active` is the present one."""

    @property
    @abstractmethod
    def parts(self) -> nn.ModuleDict:
        """The quantizers by what chooses between them."""

    @property
    @abstractmethod
    def active(self) -> Quantizer:
        """The present quantizer. UserError if there is none."""

    def quantize(self, v: Tensor) -> Tensor:
        part = self.active
        part.share = self.share
        return part(v)

    def forget(self) -> None:
        for part in self.parts.values():
            part.forget()

    def invalidate(self) -> None:
        for part in self.parts.values():
            part.invalidate()

    def inherit(self, from_bits: int, to_bits: int) -> None:
        for part in self.parts.values():
            part.inherit(from_bits, to_bits)

    def learned_parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts.values() for parameter in part.learned_parameters()]

    def relative_parameters(self) -> dict[nn.Parameter, float]:
        return {p: usual for part in self.parts.values() for p, usual in part.relative_parameters().items()}

    @property
    def needs_statistics(self) -> bool:
        return any(part.needs_statistics for part in self.parts.values())

    @property
    def data_dependent(self) -> tuple[str, ...]:
        return tuple(f"{prefix}{name}" for prefix, part in self._prefixed().items() for name in part.data_dependent)

    def check_state(self, state: Mapping[str, Any], shape: torch.Size | None) -> None:
        """See `Quantizer`. The state must fit all quantizers."""
        for prefix, part in self._prefixed().items():
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            part.check_state(own, shape)

    def _prefixed(self) -> dict[str, Quantizer]:
        """The quantizers by the prefixes of their keys in the state dict."""
        held = next(name for name, module in self.named_children() if module is self.parts)
        return {f"{held}.{key}.": part for key, part in self.parts.items()}

    @property
    def started(self) -> bool:
        return any(part.started for part in self.parts.values())

    @property
    def code_range(self) -> tuple[int, int]:
        return self.active.code_range

    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.active.scale_and_zero_point(v)

    def rounding(self, v: Tensor | None = None) -> Rounding:
        return self.active.rounding(v)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
