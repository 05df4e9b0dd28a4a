"""Small networks of every scheme, with odd norms, as tests export them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from apq.genes import sample, subnets_of
from apq.presets import DIGITS, OQA_MBV2_GLYPHS, QFA_MBV3_GLYPHS
from elastic_nn.modules.quant_layers import collecting, quantizers_off
from elastic_nn.networks.subnet import build_subnet
from elastic_nn.quantizers import BATCHQUANT, LINEAR, LINEAR_PUBLISHED, LSQ, LSQ_SCALE_FREE
from elastic_nn.training.calibration import calibrate_ranges

SPACES = {
    "linear": (DIGITS, LINEAR),
    "linear-published": (DIGITS, LINEAR_PUBLISHED),
    "lsq": (OQA_MBV2_GLYPHS, LSQ),
    "lsq-scale-free": (OQA_MBV2_GLYPHS, LSQ_SCALE_FREE),
    "batchquant": (QFA_MBV3_GLYPHS, BATCHQUANT),
}


def images_of(space, side, n=16):
    """Smooth noise of about unit variance."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(n, space.in_channels, 5, 5, generator=generator)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")


def odd(net, images):
    """Give a network norms of both signs that fit the images, and BatchQuant numbers that do something."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad(), quantizers_off(net):
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(norm.weight).sign())
            norm.bias.normal_(0.3, 0.5)
            norm.momentum = 1.0
        net.train()(images)
        net.eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith((".scale", ".offset")):
                parameter.normal_(0, 0.3)


@functools.cache
def network(name):
    """(network, images): a random subnet of a scheme with odd norms, calibrated on the images."""
    space, scheme = SPACES[name]
    torch.manual_seed(0)
    (subnet,) = subnets_of(space, sample(space, 1, np.random.default_rng(3)))
    net = build_subnet(space, subnet, scheme)
    images = images_of(space, subnet.resolution)
    odd(net, images)
    calibrate_ranges(net, images)
    with torch.no_grad(), collecting(net):  # of schemes that need it
        net(images)
        for parameter_name, parameter in net.named_parameters():
            if parameter_name.endswith("act_quant.step"):
                parameter.mul_(0.3)  # so that values are clipped
    return net, images
