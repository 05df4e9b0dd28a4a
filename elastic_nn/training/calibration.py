"""Quantizer calibration: choose every range from what one full-precision pass shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from elastic_nn.networks.mbconv_net import MBConvNet


@contextlib.contextmanager
def quantizers_off(net: MBConvNet) -> Iterator[None]:
    """Run in full precision for a while; the bits come back afterwards."""
    quantizers = [
        q for layer in net.quantized_layers() for q in (layer.weight_quant, layer.act_quant) if hasattr(q, "bits")
    ]
    bits = [quantizer.bits for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.bits = None
    try:
        yield
    finally:
        for quantizer, b in zip(quantizers, bits, strict=True):
            quantizer.bits = b


@torch.no_grad()
def calibrate_ranges(net: MBConvNet, images: Tensor) -> None:
    """Set the range of every quantizer of the active network from a batch of images: (N, C, H, W)."""
    inputs: dict[torch.nn.Module, Tensor] = {}
    layers = [layer for layer in net.quantized_layers() if hasattr(layer.weight_quant, "calibrate")]
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0].detach().clone()))
        for layer in layers
    ]
    was_training = net.training
    try:
        with quantizers_off(net):
            net.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        net.train(was_training)
    for layer, x in inputs.items():
        layer.weight_quant.calibrate(layer.active_weight(x.size(1)))
        if hasattr(layer.act_quant, "calibrate"):
            layer.act_quant.calibrate(x)
