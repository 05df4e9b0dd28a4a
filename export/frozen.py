"""A layer as constants: codes of weights, the rounding of inputs, and what a convolution needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq.errors import UserError
from apq.space import FULL_PRECISION
from elastic_nn.modules.elastic_conv import ElasticConv2d
from elastic_nn.modules.quant_layers import QuantizedLayer
from elastic_nn.quantizers import Quantizer, Rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """How inputs are rounded to codes of `bits` bits, from `lowest` to `highest`."""

    bits: int
    lowest: int
    highest: int
    rounding: Rounding  # (1,) float32 each

    @property
    def signed(self) -> bool:
        """Whether there are codes below zero."""
        return self.lowest < 0

    @property
    def step(self) -> float:
        """Distance between the values of neighbouring codes."""
        return (self.rounding.step / self.rounding.gain).item()

    @property
    def zero_point(self) -> int:
        """The code of zero, but for the offset."""
        return int(self.rounding.zero_point.item())

    @property
    def offset(self) -> float:
        """What is added to the codes before rounding, in codes."""
        return self.rounding.offset.item()

    def codes(self, x: Tensor) -> Tensor:
        """The codes of values, as whole numbers in the type of `x`."""
        step, zero_point, gain, offset = self.rounding
        return (x * gain / step + zero_point + offset).clamp(self.lowest, self.highest).round()

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        step, zero_point, gain, offset = self.rounding
        return (codes - zero_point - offset) * step / gain


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """The weights of a layer at `bits` bits: codes times a step, labels of centroids, or plain floats.

    Attributes:
        codes: whole numbers (int64) of the shape of the weights, or float32 weights if `bits` is FULL_PRECISION.
        step: (1,) float32; None for centroids and floats.
        centroids: (groups,) float32 values of the labels, or None.
    """

    bits: int
    codes: Tensor
    step: Tensor | None = None
    centroids: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether weights are whole numbers times a step."""
        return self.step is not None

    @property
    def signed(self) -> bool:
        """Whether the codes are in two's complement. Labels of centroids are not."""
        return self.centroids is None

    def values(self) -> Tensor:
        """The weights, float32."""
        if self.centroids is not None:
            return self.centroids[self.codes]
        return self.codes if self.step is None else self.codes.to(self.step.dtype) * self.step


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenLayer:
    """A convolution, or a fully connected layer (`linear`), as constants. `inputs` is None for inputs as they come.

    `padding` is that above and on the left, `padding_end` that below and on the right (None: the same).
    After folding, `multiplier`, one number or (C,), is what the sums of codes are multiplied by, and `bias` (C,) or
    None is what is then added. Before, `bias` is the layer's own.
    """

    weights: Weights
    inputs: Codes | None
    bias: Tensor | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    padding_end: tuple[int, int] | None = None
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    linear: bool = False
    multiplier: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether the layer can be computed with whole numbers: those of its inputs and of its weights."""
        return self.inputs is not None and self.weights.whole

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Rows and columns of zeros: above, left, below, right."""
        return (*self.padding, *(self.padding if self.padding_end is None else self.padding_end))

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's product of `x` and weights of its shape, as torch computes it in their type."""
        if self.linear:
            return F.linear(x, weight, bias)
        padding = self.padding
        if self.padding_end is not None:
            top, left, bottom, right = self.pads
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def largest_sum(self) -> int:
        """No sum of codes of inputs times codes of weights is larger in magnitude, nor is any part of it."""
        codes = self.inputs
        largest = max(abs(codes.lowest - codes.zero_point), abs(codes.highest - codes.zero_point))
        return int(self.weights.codes.abs().flatten(1).sum(dim=1).max()) * largest


@torch.no_grad()
def freeze(name: str, layer: nn.Module, in_channels: int) -> FrozenLayer:
    """A layer of a network as constants, as it runs on inputs of `in_channels` channels.

    UserError where its codes do not give the quantized weights back, to the bit, and for layers other than
    convolutions and fully connected ones.
    """
    geometry = _geometry(name, layer)
    if isinstance(layer, QuantizedLayer):
        weight = layer.active_weight(in_channels).detach()
        weights, inputs = freeze_weights(name, weight, layer.weight_quant), freeze_inputs(name, layer.act_quant)
    else:
        weights, inputs = Weights(bits=FULL_PRECISION, codes=layer.weight.detach().clone()), None
    bias = getattr(layer, "bias", None)
    return FrozenLayer(weights=weights, inputs=inputs, bias=None if bias is None else bias.detach().clone(), **geometry)


@torch.no_grad()
def freeze_weights(name: str, weight: Tensor, quantizer: Quantizer) -> Weights:
    """Weights as constants. UserError where codes times step are not the quantized weights, to the bit."""
    if _is_off(quantizer):
        return Weights(bits=FULL_PRECISION, codes=weight.clone())
    quantized = quantizer(weight)
    if (book := quantizer.codebook()) is not None:
        labels, centroids = book
        found = Weights(bits=quantizer.bits, codes=labels.long(), centroids=centroids.clone())
    else:
        step, _, _, _ = quantizer.rounding(weight)
        codes = (quantized.double() / step.double()).round().long()
        found = Weights(bits=quantizer.bits, codes=codes, step=step)
    if not torch.equal(found.values(), quantized):
        raise UserError(f"the weights of {name} at {quantizer.bits} bits are not whole numbers of steps")
    return found


def freeze_inputs(name: str, quantizer: Quantizer) -> Codes | None:
    """The rounding of inputs as constants; None where they are not rounded."""
    if _is_off(quantizer):
        return None
    lowest, highest = quantizer.code_range
    rounding = Rounding(*(part.detach().reshape(-1).clone() for part in quantizer.rounding()))
    if any(part.numel() != 1 for part in rounding):
        raise UserError(f"inputs of {name} have several steps: only one a layer can be exported")
    return Codes(bits=quantizer.bits, lowest=lowest, highest=highest, rounding=rounding)


def _is_off(quantizer: Quantizer) -> bool:
    return not quantizer.quantizes or not quantizer.enabled or quantizer.bits == FULL_PRECISION


def _geometry(name: str, layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, ElasticConv2d):
        side, channels = layer.active_kernel // 2, layer.active_out
        groups = channels if layer.depthwise else 1
        return {"stride": (layer.stride,) * 2, "padding": (side, side), "groups": groups}
    if isinstance(layer, nn.Linear):
        return {"linear": True}
    if not isinstance(layer, nn.Conv2d):
        raise UserError(f"layer {name} is a {type(layer).__name__}, which cannot be exported")
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UserError(f"layer {name} pads by {layer.padding_mode} {layer.padding}, which cannot be exported")
    return {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
    }
