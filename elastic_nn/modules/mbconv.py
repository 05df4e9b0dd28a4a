"""The elastic inverted-residual block (MobileNetV2, Sandler et al., CVPR 2018) and its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_nn.modules.elastic_conv import ElasticConv2d
from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.modules.squeeze_excite import ElasticSqueezeExcite
from elastic_nn.quantizers import QuantScheme

NORM_MOMENTUM = 0.1
ACTIVATIONS = {"relu6": nn.ReLU6, "relu": nn.ReLU, "h_swish": nn.Hardswish}  # by their names in a space


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Largest size of a block. `kernel_sizes` ascend.

    Without `expand` the block has no expand layer. With `squeeze` it has squeeze-and-excitation after the depthwise
    layer. With `shortcut` its input is added to its output. `norm_eps` is what BatchNorm adds to variances.
    """

    in_channels: int
    mid_channels: int
    out_channels: int
    kernel_sizes: tuple[int, ...]
    stride: int
    expand: bool = True
    squeeze: bool = False
    activation: str = "relu6"
    shortcut: bool = False
    norm_eps: float = 1e-3


class ConvNormAct(nn.Module):
    """Elastic convolution, BatchNorm, activation by name (None: no activation, as in a linear bottleneck)."""

    def __init__(self, conv: ElasticConv2d, activation: str | None, norm_eps: float) -> None:
        super().__init__()
        self.conv = conv
        self.norm = ElasticBatchNorm2d(conv.active_out, eps=norm_eps, momentum=NORM_MOMENTUM)
        self.act = ACTIVATIONS[activation](inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ElasticMBConv(nn.Module):
    """Expand, depthwise, squeeze-and-excitation, project; in some blocks with a shortcut."""

    def __init__(self, shape: BlockShape, scheme: QuantScheme) -> None:
        super().__init__()
        c, m, d = shape.in_channels, shape.mid_channels, shape.out_channels
        act, eps = shape.activation, shape.norm_eps
        if shape.expand:
            self.expand = ConvNormAct(ElasticConv2d(c, m, (1,), 1, scheme, signed_input=True), act, eps)
        else:
            self.expand = nn.Identity()
        depthwise = ElasticConv2d(m, m, shape.kernel_sizes, shape.stride, scheme, depthwise=True)
        self.depthwise = ConvNormAct(depthwise, act, eps)
        self.squeeze = ElasticSqueezeExcite(m) if shape.squeeze else nn.Identity()
        self.project = ConvNormAct(ElasticConv2d(m, d, (1,), 1, scheme), None, eps)
        self.shape, self.shortcut = shape, shape.shortcut

    def set_shape(self, kernel_size: int, mid_channels: int) -> None:
        """Choose the depthwise kernel size and the mid channels."""
        self.depthwise.conv.set_kernel(kernel_size)
        self.expand.conv.active_out = self.depthwise.conv.active_out = mid_channels

    def layers(self) -> dict[str, ConvNormAct]:
        """The convolutional layers by role: "expand", "depthwise", "project"."""
        named = {"expand": self.expand, "depthwise": self.depthwise, "project": self.project}
        return {role: unit for role, unit in named.items() if isinstance(unit, ConvNormAct)}

    @torch.no_grad()
    def sort_channels(self) -> None:
        """Sort the mid channels by importance (L1 norm of the project weights), so that slicing keeps the best.

        The output of the full-width block does not change.
        """
        order = self.project.conv.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
        self.project.conv.weight.copy_(self.project.conv.weight[:, order])
        for unit in (self.expand, self.depthwise):
            for tensor in (unit.conv.weight, *unit.norm.parameters(), unit.norm.running_mean, unit.norm.running_var):
                tensor.copy_(tensor[order])
        if isinstance(self.squeeze, ElasticSqueezeExcite):
            self.squeeze.reorder(order)

    def forward(self, x: Tensor) -> Tensor:  # (N, c, H, W) -> (N, d, H / stride, W / stride)
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.shortcut else y
