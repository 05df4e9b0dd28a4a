"""Quantizer calibration: choose every range from what one full-precision pass shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from elastic_nn.modules.elastic_conv import ElasticConv2d, QuantLinear
from elastic_nn.networks.mbconv_net import MBConvNet


@contextlib.contextmanager
def quantizers_off(net: MBConvNet) -> Iterator[None]:
    """Run in full precision for a while."""
    net.set_quantize(False)
    try:
        yield
    finally:
        net.set_quantize(True)


@torch.no_grad()
def calibrate_ranges(net: MBConvNet, images: Tensor) -> None:
    """Set the range of every quantizer of the active network from a batch of images: (N, C, H, W).

    Each layer is calibrated when its inputs arrive, so that no more than one layer's are kept.
    """
    with contextlib.ExitStack() as afterwards, quantizers_off(net):
        afterwards.callback(net.train, net.training)
        for layer in net.quantized_layers():
            afterwards.callback(layer.register_forward_pre_hook(_calibrate).remove)
        net.eval()(images)


def _calibrate(layer: ElasticConv2d | QuantLinear, args: tuple[Tensor, ...]) -> None:
    (x,) = args
    if not isinstance(layer.weight_quant, nn.Identity):
        layer.weight_quant.calibrate(layer.active_weight(x.size(1)))
    if not isinstance(layer.act_quant, nn.Identity):
        layer.act_quant.calibrate(x)
