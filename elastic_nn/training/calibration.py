"""Quantizer calibration: ranges or clusters from one full-precision pass."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from elastic_nn.modules.quant_layers import QuantizedLayer, quantized_layers, quantizers, quantizers_off
from elastic_nn.quantizers import Quantizer


def steps_learned(net: nn.Module) -> bool:
    """Whether the network has learned steps, which calibration must leave alone."""
    return any(quantizer.started for quantizer in quantizers(net))


def calibrate_ranges(net: nn.Module, images: Tensor, subnets: Iterable[Callable[[], object]] = (lambda: None,)) -> None:
    """Choose the range of every quantizer of the active network from a batch of images (N, C, H, W).

    Each layer is calibrated when its inputs arrive, so that inputs of one layer at most are in memory. A layer that
    runs several times gets ranges for all its inputs. Layers that do not run keep their ranges. A supernet runs once
    for each of `subnets`, functions that activate one.
    """
    seen: set[str] = set()

    def calibrate(name: str, layer: QuantizedLayer, x: Tensor) -> None:
        for quantizer, values in _operands(layer, x).values():
            if name not in seen:
                quantizer.forget()
            quantizer.calibrate(values)
        seen.add(name)

    with quantizers_off(net):
        for activate in subnets:
            activate()
            _observe(net, quantized_layers(net), images, calibrate)


def calibration_table(
    net: nn.Module, images: Tensor, choices: Iterable[int]
) -> dict[tuple[str, str, int], dict[str, Tensor]]:
    """The states that calibration would give each quantizer at each bit-width. The network does not change.

    Returns (layer, "weight_quant" or "act_quant", bits) -> state dict, for all quantized operands.
    """
    table: dict[tuple[str, str, int], Quantizer] = {}
    choices = tuple(choices)

    def calibrate(name: str, layer: QuantizedLayer, x: Tensor) -> None:
        for kind, (quantizer, values) in _operands(layer, x).items():
            for bits in choices:
                if (name, kind, bits) not in table:
                    table[name, kind, bits] = _forgotten(quantizer, bits)
                table[name, kind, bits].calibrate(values)

    with quantizers_off(net):
        _observe(net, quantized_layers(net), images, calibrate)
    return {key: quantizer.state_dict() for key, quantizer in table.items()}


def _forgotten(quantizer: Quantizer, bits: int) -> Quantizer:
    """A copy of a quantizer at these bits, without its range."""
    own = copy.deepcopy(quantizer)
    own.forget()
    own.bits = bits
    return own


def signed_inputs(net: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, bool]:
    """Whether the inputs of each named layer are ever negative on these images."""
    signed = dict.fromkeys(names, False)

    def check_sign(name: str, layer: nn.Module, x: Tensor) -> None:
        signed[name] = signed[name] or bool(x.min() < 0)

    _observe(net, {name: net.get_submodule(name) for name in names}, images, check_sign)
    return signed


def _operands(layer: QuantizedLayer, x: Tensor) -> dict[str, tuple[Quantizer, Tensor]]:
    """The quantizers of a layer, each with the values that it quantizes for inputs `x`."""
    values = {"weight_quant": layer.active_weight(x.size(1)), "act_quant": x}
    return {kind: (quantizer, values[kind]) for kind, quantizer in layer.operands().items()}


@torch.no_grad()
def _observe(
    net: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, observe: Callable[[str, nn.Module, Tensor], None]
) -> None:
    """Run the network in evaluation mode and call `observe` with each layer and its inputs as they arrive."""
    modes = [(module, module.training) for module in net.modules()]
    with contextlib.ExitStack() as afterwards:
        for module, training in modes:
            afterwards.callback(setattr, module, "training", training)
        for name, layer in layers.items():

            def seen(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str = name) -> None:
                observe(name, layer, args[0] if args else kwargs["input"])

            afterwards.callback(layer.register_forward_pre_hook(seen, with_kwargs=True).remove)
        net.eval()(images)
