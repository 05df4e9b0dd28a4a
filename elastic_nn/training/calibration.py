"""Quantizer calibration: choose every range from what one full-precision pass shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from elastic_nn.modules.quant_layers import quantized_layers, set_quantize


@contextlib.contextmanager
def quantizers_off(net: nn.Module) -> Iterator[None]:
    """Run in full precision for a while."""
    set_quantize(net, False)
    try:
        yield
    finally:
        set_quantize(net, True)


@torch.no_grad()
def calibrate_ranges(net: nn.Module, images: Tensor) -> None:
    """Set the range of every quantizer of the active network from a batch of images: (N, C, H, W).

    Each layer is calibrated when its inputs arrive, so that no more than one layer's are kept.
    """
    with contextlib.ExitStack() as afterwards, quantizers_off(net):
        afterwards.callback(net.train, net.training)
        for layer in quantized_layers(net).values():
            afterwards.callback(layer.register_forward_pre_hook(_calibrate).remove)
        net.eval()(images)


def _calibrate(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    (x,) = args
    if not isinstance(layer.weight_quant, nn.Identity):
        layer.weight_quant.calibrate(layer.active_weight(x.size(1)))
    if not isinstance(layer.act_quant, nn.Identity):
        layer.act_quant.calibrate(x)
