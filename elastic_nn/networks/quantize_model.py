"""Turn layers of any network into quantized ones, and back. They stay the same modules, with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apq.errors import UserError
from apq.policy import Policy
from elastic_nn.modules.quant_layers import QuantConv2d, QuantizedLayer, QuantLinear, name_quantizers, quantized_layers
from elastic_nn.networks.quantized_run import check_quantized
from elastic_nn.quantizers import QuantScheme

QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
TOO_COARSE = (torch.bfloat16, torch.float16)  # for the values of 8-bit codes


def quantize_model(
    net: nn.Module,
    names: Sequence[str],
    scheme: QuantScheme,
    signed: Mapping[str, bool],
    image_shape: Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """Turn the named layers into quantized ones, in place, and return copies of the layers as they were.

    A layer changes its class and stays the same object: its other names, references in lists and closures, and hooks
    stay valid. `names` are in running order. The input of the first layer, the image, is not quantized. `signed` says
    for each layer whether its input may be negative. With `image_shape` (C, H, W) the network runs once, to prove that
    these layers alone multiply weights, through their quantizers; see `check_quantized`. UserError for a layer that
    cannot be quantized, and where the proof fails; the network is then as before.
    """
    layers = _layers(net, names)
    before = {name: _copy(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__class__ = QUANTIZED.get(type(layer), type(layer))
        layer.set_quantizers(scheme, signed_input=signed[name], quantize_input=name != names[0])
        for quantizer in layer.operands().values():
            quantizer.to(layer.weight.device)
        layer.train(layer.training)
    name_quantizers(net)
    if image_shape is not None:
        try:
            check_quantized(net, names, image_shape)
        except UserError:
            restore_model(net, before)
            raise
    return before


def restore_model(net: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Undo `quantize_model`: the layers become again what it returned, with their present weights."""
    for name, old in before.items():
        layer = net.get_submodule(name)
        layer.__class__, layer._modules = type(old), dict(old._modules)


def set_policy(net: nn.Module, policy: Policy) -> None:
    """Set the bits of each quantized layer."""
    layers = quantized_layers(net)
    for name, row in zip(policy.names, policy.bits, strict=True):
        layers[name].set_bits(row[0], row[-1])


def _layers(net: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The named layers. UserError if one of them cannot be quantized, or shares its weights with another."""
    modules = dict(net.named_modules())
    if "" in names:
        raise UserError(
            f"the network is a single {type(net).__name__}, or multiplies weights outside its modules: its layers must "
            "be modules within it"
        )
    of_weight: dict[tuple[int, int], str] = {}
    if unknown := [name for name in names if name not in modules]:
        raise UserError(f"layer {unknown[0]} is not in the network")
    for name in names:
        layer, kind = modules[name], type(modules[name])
        # A weight that is no parameter is computed from others, by a hook or a parametrization.
        if not isinstance(layer, QuantizedLayer) and not (kind in QUANTIZED and isinstance(layer.weight, nn.Parameter)):
            raise UserError(
                f"layer {name} is a {kind.__name__}; only Conv2d and Linear of torch, with weights of their own, can "
                "be quantized"
            )
        if layer.weight.dtype in TOO_COARSE:
            dtype = str(layer.weight.dtype).removeprefix("torch.")
            raise UserError(f"layer {name} has {dtype} weights: turn the network into float32 first, with net.float()")
        place = layer.weight.untyped_storage()._cdata, layer.weight.storage_offset()
        if (other := of_weight.setdefault(place, name)) != name:
            raise UserError(
                f"layers {other} and {name} share their weights, which cannot have the bits of both: give each its "
                "own, or run one module twice"
            )
    return {name: modules[name] for name in names}


def _copy(layer: nn.Module) -> nn.Module:
    """A copy that shares the parameters with the layer, but keeps its present class and quantizers."""
    own = copy.copy(layer)
    own._modules = dict(layer._modules)
    return own
