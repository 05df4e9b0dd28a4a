"""The base class of quantizers, and the quantizer of an operand in full precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apq.errors import UserError
from apq.space import FULL_PRECISION
from elastic_nn.quantizers.functional import code_range


class Rounding(NamedTuple):
    """The rounding of values to codes: round(clip(value * gain / step + zero_point + offset, lowest, highest code)).

    A code stands for (code - zero_point - offset) * step / gain. The zero point is a whole number, the offset is not.
    All are tensors that broadcast against the values.
    """

    step: Tensor
    zero_point: Tensor
    gain: Tensor
    offset: Tensor


class Quantizer(nn.Module, ABC):
    """Base class of quantizers, which round tensors to the values of codes.

    `bits` and `enabled` are run-time state. If `enabled` is off or `bits` is FULL_PRECISION, tensors pass unchanged.
    `signed` says whether there are codes below zero. Ranges, steps and clusters are parameters or buffers, so that
    they are saved with the network.

    A subclass implements `quantize`, `calibrate`, `forget` and `scale_and_zero_point`, and overrides other methods
    where the default does not fit.
    """

    label = "a layer"  # name of the layer in messages
    quantizes = True  # False: every tensor passes unchanged
    needs_statistics = False  # True: the range comes from a pass over images, see `begin_statistics`
    data_dependent: tuple[str, ...] = ()  # names of tensors whose shapes depend on the quantized values
    synchronised = False  # True: take statistics over the images of all processes, which share each batch
    share = 1.0  # fraction of the values in one forward pass: of a training step's images, or of a whole filter
    keeps_zeros = False  # True: values that are exactly zero, such as pruned weights, stay zero through training

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
        """Round `v` to the values of codes, with gradients for training."""

    @abstractmethod
    def calibrate(self, v: Tensor) -> None:
        """Choose the range from values at the present bits.

        The range depends on the values of all calls since construction, `forget` or the loading of a state, as a layer
        that runs several times needs. `calibrate` of each kind says how calls are combined. Where it can, the result is
        that of one call with all values; otherwise it covers them or is their average. An exception are clusters of
        weights, which belong to one tensor: the last call counts.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop the range, so that calibration starts anew."""

    @abstractmethod
    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the present range: value = scale * (code - zero point).

        Both broadcast against the quantized tensor. The zero point need not be a whole number. `v` is the tensor to
        quantize, which is needed where the range follows its values. UserError where there is no range or no scale.
        """

    def rounding(self, v: Tensor | None = None) -> Rounding:
        """The present rounding, in the operations that `quantize` has. `v` and errors: see `scale_and_zero_point`.

        By default gain and offset do nothing.
        """
        scale, zero_point = self.scale_and_zero_point(v)
        return Rounding(scale, zero_point, torch.ones_like(scale), torch.zeros_like(scale))

    def codebook(self) -> tuple[Tensor, Tensor] | None:
        """Labels of the weights, and the values of the labels, where codes are labels. Otherwise None."""
        return None

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return code_range(self.bits, signed=self.signed)

    @property
    def started(self) -> bool:
        """Whether there is a learned range. Calibration of a network leaves it alone."""
        return False

    def learned_parameters(self) -> list[nn.Parameter]:
        """Ranges, steps and offsets that training learns, without weight decay and with gradients clipped apart."""
        return list(self.parameters())

    def relative_parameters(self) -> dict[nn.Parameter, float]:
        """The learned parameters that training moves by fractions of their size, each with its usual size.

        They are in the units of the values that are quantized, and not 0 once calibrated. At its usual size a parameter
        moves as far as any other, at c times that size c times as far. There are none by default.
        """
        return {}

    def inherit(self, from_bits: int, to_bits: int) -> None:
        """Turn the range of a network of more bits into one for fewer bits. By default it stays."""

    def set_kernel(self, kernel_size: int) -> None:
        """Follow the kernel size of a depthwise layer. By default one range serves all kernel sizes."""

    def at_kernel(self) -> Quantizer:
        """The quantizer of the present kernel size, for a layer that has only this one."""
        return self

    def restrict(self, choices: Collection[int]) -> None:
        """Drop what only bit-widths other than `choices` need."""

    def begin_statistics(self) -> None:
        """Start to collect statistics, before a pass over images."""

    def end_statistics(self) -> None:
        """Stop collecting statistics, after the pass."""

    def invalidate(self) -> None:
        """Drop statistics of activations, because the weights or the active layers of the network change."""

    def check_state(self, state: Mapping[str, Any], shape: torch.Size | None) -> None:
        """UserError unless the `data_dependent` tensors of a state fit the operand at the present bits.

        `shape` is that of the operand, or None for activations, whose shape varies.
        """

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class NoQuantizer(Quantizer):
    """The quantizer of an operand in full precision. It has no tensors. Its bits are always FULL_PRECISION."""

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
        raise UserError("an operand in full precision has no codes")

    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise UserError("an operand in full precision has no scale")

    def extra_repr(self) -> str:
        return ""
