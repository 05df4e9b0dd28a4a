"""BatchNorm for inputs with any number of channels."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


def first(tensor: Tensor, n: int) -> Tensor:
    """The first n rows. If these are all rows, it is the tensor itself, which saves a copy in the backward pass."""
    return tensor if tensor.size(0) == n else tensor[:n]


class ElasticBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises an input of C channels with its first C scales, shifts and statistics.

    The statistics of a supernet mix those of all its subnets: recalibrate after choosing one. With `synchronised`,
    training steps take statistics over the images of all processes.
    """

    synchronised = False

    def forward(self, x: Tensor) -> Tensor:
        channels = x.size(1)
        mean, var = first(self.running_mean, channels), first(self.running_var, channels)
        weight, bias = first(self.weight, channels), first(self.bias, channels)
        if self.training:
            self.num_batches_tracked.add_(1)
            if self.synchronised:
                return _synchronised_norm(x, mean, var, weight, bias, self.momentum, self.eps)
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Allow any number of channels up to `num_features`."""


def _synchronised_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float, eps: float
) -> Tensor:
    """Batch normalisation over all processes. torch's own needs a GPU and a fixed number of channels.

    Statistics of half-precision inputs are computed in float32, as torch does.
    """
    dtype, x = x.dtype, x.to(weight.dtype)
    count = _SumOverProcesses.apply(x.new_tensor([x.numel() / x.size(1)]))
    mean = _SumOverProcesses.apply(x.sum((0, 2, 3))) / count  # (C,)
    centred = x - mean[:, None, None]
    var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    return (centred * (weight * (var + eps).rsqrt())[:, None, None] + bias[:, None, None]).to(dtype)


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes. Each process has the sum, so the gradient of a part is the sum of all gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad
