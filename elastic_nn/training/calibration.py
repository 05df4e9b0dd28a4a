"""Quantizer calibration: choose every range from what one full-precision pass shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from elastic_nn.modules.elastic_conv import ElasticConv2d, QuantLinear
from elastic_nn.networks.mbconv_net import MBConvNet


@contextlib.contextmanager
def quantizers_off(net: MBConvNet) -> Iterator[dict[nn.Module, int | None]]:
    """Run in full precision for a while; gives each quantizer's bits, which come back afterwards."""
    bits = {
        quantizer: quantizer.bits
        for layer in net.quantized_layers()
        for quantizer in (layer.weight_quant, layer.act_quant)
        if hasattr(quantizer, "bits")
    }
    for quantizer in bits:
        quantizer.bits = None
    try:
        yield bits
    finally:
        for quantizer, b in bits.items():
            quantizer.bits = b


@torch.no_grad()
def calibrate_ranges(net: MBConvNet, images: Tensor) -> None:
    """Set the range of every quantizer of the active network from a batch of images: (N, C, H, W).

    Each layer is calibrated when its inputs arrive, so that no more than one layer's are kept.
    """
    with contextlib.ExitStack() as afterwards, quantizers_off(net) as bits:
        afterwards.callback(net.train, net.training)

        def calibrate(layer: ElasticConv2d | QuantLinear, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            layer.weight_quant.calibrate(layer.active_weight(x.size(1)), bits[layer.weight_quant])
            if layer.act_quant in bits:
                layer.act_quant.calibrate(x, bits[layer.act_quant])

        for layer in net.quantized_layers():
            if layer.weight_quant in bits:
                afterwards.callback(layer.register_forward_pre_hook(calibrate).remove)
        net.eval()(images)
