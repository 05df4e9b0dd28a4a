"""The elastic convolution, in full precision or quantized.

Weights are sliced, never copied: fewer channels are the first ones. A smaller depthwise kernel is the centre of the
next larger one times a learned matrix (once-for-all, Cai et al., ICLR 2020, arXiv 1908.09791).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_nn.modules.convolution import convolve
from elastic_nn.modules.elastic_norm import first
from elastic_nn.modules.quant_layers import QuantizedLayer
from elastic_nn.quantizers import QuantScheme


class ElasticConv2d(QuantizedLayer, nn.Module):
    """Convolution with "same" padding whose output channels and kernel size are chosen at run time.

    Args:
        kernel_sizes: ascending choices; more than one needs `depthwise`.
        scheme: makes the quantizers.
        depthwise: one filter for each channel of the input. In mixed precision it has quantizers for each kernel size.
        signed_input: whether the input may be negative.
        quantize_input: False leaves the input in full precision, as for images.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: tuple[int, ...],
        stride: int,
        scheme: QuantScheme,
        *,
        depthwise: bool = False,
        signed_input: bool = False,
        quantize_input: bool = True,
    ) -> None:
        super().__init__()
        largest = kernel_sizes[-1]
        self.weight = nn.Parameter(torch.empty(out_channels, 1 if depthwise else in_channels, largest, largest))
        nn.init.kaiming_normal_(self.weight, mode="fan_out" if not depthwise else "fan_in")
        self.kernel_transforms = nn.ParameterDict(
            {f"{big}to{small}": nn.Parameter(torch.eye(small**2)) for small, big in pairwise(kernel_sizes)}
        )
        own = scheme.per_kernel(kernel_sizes) if len(kernel_sizes) > 1 else scheme
        self.set_quantizers(own, signed_input=signed_input, quantize_input=quantize_input)
        self.stride, self.depthwise, self.kernel_sizes = stride, depthwise, kernel_sizes
        self.whole_filters = scheme.mixed_precision
        self.active_kernel, self.active_out = largest, out_channels

    def set_kernel(self, kernel_size: int) -> None:
        """Choose the kernel size."""
        self.active_kernel = kernel_size
        for quantizer in self.operands().values():
            quantizer.set_kernel(kernel_size)

    def active_weight(self, in_channels: int) -> Tensor:
        """The full-precision weights in use for inputs with `in_channels` channels."""
        if self.depthwise:
            return self._centre_kernel(first(self.weight, in_channels))
        w = first(self.weight, self.active_out)
        return w if w.size(1) == in_channels else w[:, :in_channels]

    def _centre_kernel(self, w: Tensor) -> Tensor:  # w: (C, 1, K, K), K the largest
        for small, big in reversed(list(pairwise(self.kernel_sizes))):
            if small < self.active_kernel:
                break
            edge = (big - small) // 2
            crop = w[:, :, edge:-edge, edge:-edge].flatten(2)  # (C, 1, small * small)
            w = F.linear(crop, self.kernel_transforms[f"{big}to{small}"]).unflatten(2, (small, small))
        return w

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, D, ceil(H / stride), ceil(W / stride))
        w = self.active_weight(x.size(1))
        if self.whole_filters:  # QFA quantizes before it slices: the gradient of a step counts all channels
            self.weight_quant.share = w.size(0) * w.size(1) / (self.weight.size(0) * self.weight.size(1))
        w = self.weight_quant(w)
        return convolve(self.act_quant(x), w, stride=self.stride, depthwise=self.depthwise)

    def extra_repr(self) -> str:
        return f"kernel={self.active_kernel} of {self.kernel_sizes}, out={self.active_out}, stride={self.stride}"
