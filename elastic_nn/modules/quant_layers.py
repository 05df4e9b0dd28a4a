"""Ordinary layers with the quantizers of a scheme, and the quantizers that any network carries.

A quantized layer, also an elastic one, has `weight_quant`, `act_quant` and `active_weight(in_channels)`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from elastic_nn.quantizers import BatchQuantizer, PerBits, QuantScheme


class QuantConv2d(nn.Conv2d):
    """Convolution with quantizers; `quantize_input=False` leaves the input raw, as images are."""

    def __init__(
        self, *args: Any, scheme: QuantScheme, signed_input: bool = False, quantize_input: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight_quant = scheme.weight()
        self.act_quant = scheme.activation(signed_input) if quantize_input else nn.Identity()

    def active_weight(self, in_channels: int) -> Tensor:
        """The full-precision weights in use: all of them."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.act_quant(x), self.weight_quant(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """Fully connected layer with quantizers."""

    def __init__(
        self, in_features: int, out_features: int, scheme: QuantScheme, *, bias: bool = True, signed_input: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight_quant = scheme.weight()
        self.act_quant = scheme.activation(signed_input)

    def active_weight(self, in_features: int) -> Tensor:
        """The full-precision weights in use: all of them."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., D)
        return F.linear(self.act_quant(x), self.weight_quant(self.weight), self.bias)


def quantized_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can carry quantizers, by its path, in module order."""
    return {name: module for name, module in net.named_modules() if hasattr(module, "weight_quant")}


def quantizers(net: nn.Module) -> list[nn.Module]:
    """Every quantizer of weights and activations; none in a float network."""
    both = (part for layer in quantized_layers(net).values() for part in (layer.weight_quant, layer.act_quant))
    return [quantizer for quantizer in both if not isinstance(quantizer, nn.Identity)]


def batch_quantizers(net: nn.Module) -> list[BatchQuantizer]:
    """Every quantizer that keeps statistics of its inputs, of all numbers of bits."""
    return [module for module in net.modules() if isinstance(module, BatchQuantizer)]


def per_bits_quantizers(net: nn.Module) -> list[PerBits]:
    """Every operand of a mixed-precision network, in module order."""
    return [module for module in net.modules() if isinstance(module, PerBits)]


def set_quantize(net: nn.Module, on: bool) -> None:
    """Switch quantization on or off everywhere; bits and ranges stay."""
    for quantizer in quantizers(net):
        quantizer.enabled = on
