"""Swap the layers of any network for quantized ones, and back: float and quantized layers share their weights."""

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
    """Give the layers of these names, in running order, the quantizers of a scheme. Returns the layers before that.

    `signed` says of each layer whether its inputs may be negative. The image that enters the first is not quantized.
    UserError for a layer of a kind that has no quantized twin.
    """
    if "" in names:
        raise UserError(f"the network is a single {type(net).__name__}: its layers must be modules within it")
    before = {name: net.get_submodule(name) for name in names}
    twins = {name: _twin(name, layer, scheme, signed[name], name != names[0]) for name, layer in before.items()}
    _put(net, twins)
    name_quantizers(net)
    return before


def restore_model(net: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Undo `quantize_model`: the layers that it returned take their places again, with the weights as they are now."""
    _put(net, before)


def set_policy(net: nn.Module, policy: Policy) -> None:
    """Give each quantized layer its bits."""
    layers = quantized_layers(net)
    for name, row in zip(policy.names, policy.bits, strict=True):
        layers[name].set_bits(row[0], row[-1])


def _put(net: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        path, _, last = name.rpartition(".")
        setattr(net.get_submodule(path), last, layer)


def _twin(name: str, layer: nn.Module, scheme: QuantScheme, signed: bool, quantize_input: bool) -> QuantizedLayer:
    kind = type(layer)
    if isinstance(layer, QuantizedLayer):
        twin = copy.copy(layer)
        twin._modules = dict(layer._modules)
    elif kind in (nn.Conv2d, nn.Linear) and isinstance(layer.weight, nn.Parameter):  # not one computed by a hook
        with torch.device("meta"):  # its weights are those of the layer
            twin = _conv(layer) if kind is nn.Conv2d else _linear(layer)
        twin.weight, twin.bias = layer.weight, layer.bias
    else:
        raise UserError(
            f"layer {name} is a {kind.__name__}; only Conv2d and Linear of torch, with weights of their own, can be "
            "quantized"
        )
    twin.set_quantizers(scheme, signed_input=signed, quantize_input=quantize_input)
    for quantizer in twin.operands().values():
        quantizer.to(layer.weight.device)
    return twin.train(layer.training)


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
