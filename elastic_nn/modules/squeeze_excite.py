"""Squeeze-and-excitation for inputs with any number of channels, in full precision.

Hu et al., CVPR 2018; position and gate as in MobileNetV3 (Howard et al., ICCV 2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq.layers import squeezed_channels
from elastic_nn.modules.convolution import convolve
from elastic_nn.modules.elastic_norm import first


class ElasticSqueezeExcite(nn.Module):
    """Scales each channel by a gate from 0 to 1, computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = squeezed_channels(channels)
        self.reduce = _FirstChannels(channels, inside, 1)
        self.excite = _FirstChannels(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> same
        channels = x.size(1)
        inside = F.relu(self.reduce(x.mean((2, 3), keepdim=True), squeezed_channels(channels)))
        return x * F.hardsigmoid(self.excite(inside, channels))

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Follow a new order of the block's mid channels, and sort the inner channels by importance."""
        self.reduce.weight.copy_(self.reduce.weight[:, order])
        for tensor in self.excite.parameters():
            tensor.copy_(tensor[order])
        inner = self.excite.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
        self.excite.weight.copy_(self.excite.weight[:, inner])
        for tensor in self.reduce.parameters():
            tensor.copy_(tensor[inner])

    @torch.no_grad()
    def copy_first(self, source: ElasticSqueezeExcite) -> None:
        """Copy the first channels of a wider one."""
        for own, other in zip(self.parameters(), source.parameters(), strict=True):
            own.copy_(other[tuple(slice(n) for n in own.shape)])


class _FirstChannels(nn.Conv2d):
    """1x1 convolution that uses its first C input and D output channels."""

    def forward(self, x: Tensor, out_channels: int) -> Tensor:  # (N, C, 1, 1) -> (N, D, 1, 1)
        weight = first(self.weight, out_channels)
        weight = weight if weight.size(1) == x.size(1) else weight[:, : x.size(1)]
        return convolve(x, weight, first(self.bias, out_channels))
