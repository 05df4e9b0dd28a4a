"""Replace the layers of any network by quantized ones, and back. Float and quantized layers share their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apq.errors import UserError
from apq.policy import Policy
from elastic_nn.modules.quant_layers import QuantConv2d, QuantizedLayer, QuantLinear, name_quantizers, quantized_layers
from elastic_nn.quantizers import FLOAT, QuantScheme


def quantize_model(
    net: nn.Module, names: Sequence[str], scheme: QuantScheme, signed: Mapping[str, bool]
) -> dict[str, nn.Module]:
    """Replace the named layers by quantized ones, in place, and return the layers that were replaced.

    `names` are in running order. The input of the first layer, the image, is not quantized. `signed` says for each
    layer whether its input may be negative. UserError for a layer that cannot be quantized.
    """
    if "" in names:
        raise UserError(f"the network is a single {type(net).__name__}: its layers must be modules within it")
    before = {name: net.get_submodule(name) for name in names}
    _put(net, {name: _quantized(name, layer, scheme, signed[name], name != names[0]) for name, layer in before.items()})
    name_quantizers(net)
    return before


def restore_model(net: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Undo `quantize_model`: put back the layers that it returned, with their present weights."""
    _put(net, before)


def set_policy(net: nn.Module, policy: Policy) -> None:
    """Set the bits of each quantized layer."""
    layers = quantized_layers(net)
    for name, row in zip(policy.names, policy.bits, strict=True):
        layers[name].set_bits(row[0], row[-1])


def _put(net: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        path, _, last = name.rpartition(".")
        setattr(net.get_submodule(path), last, layer)


def _quantized(name: str, layer: nn.Module, scheme: QuantScheme, signed: bool, quantize_input: bool) -> QuantizedLayer:
    """A quantized layer with the weights of this one."""
    kind = type(layer)
    if isinstance(layer, QuantizedLayer):
        quantized = copy.copy(layer)
        quantized._modules = dict(layer._modules)
    elif kind in (nn.Conv2d, nn.Linear) and isinstance(layer.weight, nn.Parameter):  # not one computed by a hook
        with torch.device("meta"):  # it gets the weights of the layer
            quantized = _conv(layer) if kind is nn.Conv2d else _linear(layer)
        quantized.weight, quantized.bias = layer.weight, layer.bias
    else:
        raise UserError(
            f"layer {name} is a {kind.__name__}; only Conv2d and Linear of torch, with weights of their own, can be "
            "quantized"
        )
    quantized.set_quantizers(scheme, signed_input=signed, quantize_input=quantize_input)
    for quantizer in quantized.operands().values():
        quantizer.to(layer.weight.device)
    return quantized.train(layer.training)


def _conv(layer: nn.Conv2d) -> QuantConv2d:
    return QuantConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        scheme=FLOAT,
    )


def _linear(layer: nn.Linear) -> QuantLinear:
    return QuantLinear(layer.in_features, layer.out_features, FLOAT, bias=layer.bias is not None)
