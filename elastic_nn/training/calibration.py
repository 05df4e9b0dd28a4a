"""Quantizer calibration: choose ranges or clusters from what one full-precision pass shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from elastic_nn.modules.quant_layers import quantized_layers, set_quantize
from elastic_nn.quantizers import LsqQuantizer


@contextlib.contextmanager
def quantizers_off(net: nn.Module) -> Iterator[None]:
    """Run in full precision for a while."""
    set_quantize(net, False)
    try:
        yield
    finally:
        set_quantize(net, True)


def steps_learned(net: nn.Module) -> bool:
    """Whether the network has learned-step quantizers that were started: calibration must leave these alone."""
    return any(isinstance(part, LsqQuantizer) and bool(part.step.item()) for part in net.modules())


def calibrate_ranges(net: nn.Module, images: Tensor) -> None:
    """Set the range of every quantizer of the active network from a batch of images: (N, C, H, W).

    Each layer is calibrated when its inputs arrive, so that no more than one layer's are kept.
    """
    with quantizers_off(net):
        _observe(net, quantized_layers(net), images, lambda name, layer, x: _calibrate(layer, x))


def calibration_table(
    net: nn.Module, images: Tensor, choices: Iterable[int]
) -> dict[tuple[str, str, int], dict[str, Tensor]]:
    """States that calibration gives each quantizer at each number of bits: (layer, "weight_quant" or "act_quant", bits)
    -> state dict. The quantizers are left at the last of the choices."""
    table = {}

    def calibrate(name: str, layer: nn.Module, x: Tensor) -> None:
        for bits in choices:
            layer.weight_quant.bits = layer.act_quant.bits = bits
            _calibrate(layer, x)
            for kind in ("weight_quant", "act_quant"):
                state = getattr(layer, kind).state_dict()
                table[name, kind, bits] = {key: tensor.clone() for key, tensor in state.items()}

    with quantizers_off(net):
        _observe(net, quantized_layers(net), images, calibrate)
    return table


def signed_inputs(net: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, bool]:
    """Whether the inputs of each named layer take both signs on these images."""
    signed = dict.fromkeys(names, False)

    def look(name: str, layer: nn.Module, x: Tensor) -> None:
        signed[name] = signed[name] or bool(x.min() < 0)

    _observe(net, {name: net.get_submodule(name) for name in names}, images, look)
    return signed


@torch.no_grad()
def _observe(
    net: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, look: Callable[[str, nn.Module, Tensor], None]
) -> None:
    """Run the network in evaluation mode and show each layer its inputs as they arrive."""
    modes = [(module, module.training) for module in net.modules()]
    with contextlib.ExitStack() as afterwards:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda layer, args, name=name: look(name, layer, args[0]))
            afterwards.callback(hook.remove)
        net.eval()(images)
    for module, training in modes:
        module.training = training


def _calibrate(layer: nn.Module, x: Tensor) -> None:
    if not isinstance(layer.weight_quant, nn.Identity):
        layer.weight_quant.calibrate(layer.active_weight(x.size(1)))
    if not isinstance(layer.act_quant, nn.Identity):
        layer.act_quant.calibrate(x)
