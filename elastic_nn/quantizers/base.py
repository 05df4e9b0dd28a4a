"""What every quantizer is and does, and the quantizer of an operand that stays in floating point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apq.errors import UserError
from apq.space import FULL_PRECISION
from elastic_nn.quantizers.functional import code_range


class Quantizer(nn.Module, ABC):
    """Base class of quantizers: rounds a tensor to the values that its codes stand for.

    `bits` and `enabled` are run-time state. With `enabled` off, or with FULL_PRECISION bits, tensors pass unchanged.
    `signed` says whether there are codes below zero. Ranges, steps and clusters are parameters or buffers, so that
    they are saved with a network.

    A subclass implements `quantize`, `calibrate`, `forget` and `scale_and_zero_point`. It overrides the rest where the
    default does not fit.
    """

    label = "a layer"  # the layer that messages name
    quantizes = True  # False: every tensor passes unchanged
    needs_statistics = False  # True: the range comes from a pass over images, see `begin_statistics`
    data_dependent: tuple[str, ...] = ()  # names of tensors whose shapes depend on what was quantized
    synchronised = False  # processes share each batch: statistics are those of the whole batch
    batch_share = 1.0  # part of a training step's images that is in one forward pass

    def __init__(self, signed: bool) -> None:
        super().__init__()
        self.signed = signed
        self.bits, self.enabled = 8, True

    def forward(self, v: Tensor) -> Tensor:
        if not self.enabled or self.bits == FULL_PRECISION:
            return v
        return self.quantize(v)

    @abstractmethod
    def quantize(self, v: Tensor) -> Tensor:
        """`v` rounded to the values of the codes, with the gradients that training needs."""

    @abstractmethod
    def calibrate(self, v: Tensor) -> None:
        """Choose the range from these values. Calls after construction or `forget` add up: the range covers all."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the range, so that calibration starts anew."""

    @abstractmethod
    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the current range: real value = scale * (code - zero_point).

        Both broadcast against the quantized tensor; the zero point need not be whole. `v` is the tensor to quantize,
        needed where the range follows its values. UserError where there is no range, or no such scale.
        """

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return code_range(self.bits, signed=self.signed)

    @property
    def started(self) -> bool:
        """Whether a range that is learned is set. Calibration of a network leaves such ranges alone."""
        return False

    def learned_parameters(self) -> list[nn.Parameter]:
        """Ranges, steps and offsets that training learns. They are not decayed; their gradients are clipped apart."""
        return list(self.parameters())

    def inherit(self, from_bits: int, to_bits: int) -> None:
        """Turn the range of a network of more bits into the one that fewer bits start from. Clip ranges stay."""

    def restrict(self, choices: Collection[int]) -> None:
        """Drop what only other bit-widths than these need."""

    def begin_statistics(self) -> None:
        """Collect statistics from now on: the tensors of a pass over images follow."""

    def end_statistics(self) -> None:
        """Stop collecting: the pass is over."""

    def invalidate(self) -> None:
        """Drop statistics of activations that are no longer those of the network: its weights or layers changed."""

    def check_state(self, state: Mapping[str, Any], shape: torch.Size) -> None:
        """UserError unless the `data_dependent` tensors of a state fit an operand of this shape at these bits."""

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class NoQuantizer(Quantizer):
    """The quantizer of an operand in floating point. It has no tensors; its bits are always FULL_PRECISION."""

    quantizes = False

    def __init__(self, signed: bool = True) -> None:
        super().__init__(signed)

    @property
    def bits(self) -> int:
        return FULL_PRECISION

    @bits.setter
    def bits(self, bits: int) -> None:
        """Ignored."""

    def quantize(self, v: Tensor) -> Tensor:
        return v

    def calibrate(self, v: Tensor) -> None:
        """Nothing to choose."""

    def forget(self) -> None:
        """Nothing to drop."""

    @property
    def code_range(self) -> tuple[int, int]:
        raise UserError("an operand in floating point has no codes")

    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise UserError("an operand in floating point has no scale")

    def extra_repr(self) -> str:
        return ""
