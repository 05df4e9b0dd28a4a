"""BatchNorm for inputs with any number of channels."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


def first(tensor: Tensor | None, n: int) -> Tensor | None:
    """The first n rows. If these are all rows, it is the tensor itself, which saves a copy in the backward pass.

    None stays None, as for a norm without scales.
    """
    return tensor if tensor is None or tensor.size(0) == n else tensor[:n]


class ElasticBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises an input of C channels with its first C scales, shifts and statistics.

    The statistics of a supernet mix those of all its subnets: recalibrate after choosing one. With `synchronised`,
    training steps take statistics over the images of all processes.
    """

    synchronised = False

    def forward(self, x: Tensor) -> Tensor:
        channels = x.size(1)
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (first(tensor, channels) for tensor in own)
        share = self._count_batch()
        if self.training and not self.track_running_stats:
            mean = var = None
        if self.training and self.synchronised:
            return _synchronised_norm(x, mean, var, weight, bias, share, self.eps)
        of_batch = self.training or mean is None
        return F.batch_norm(x, mean, var, weight, bias, of_batch, share, self.eps)

    def _count_batch(self) -> float:
        """Count a batch of training. Returns its weight in the running statistics, as torch has it."""
        if self.training and self.num_batches_tracked is not None and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # an average over all batches
                return 1 / self.num_batches_tracked.item()
        return self.momentum or 0.0

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Allow any number of channels up to `num_features`."""


def _synchronised_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation over all processes. torch's own needs a GPU and a fixed number of channels.

    Statistics of half-precision inputs are computed in float32, as torch does.
    """
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32) if weight is None else weight.dtype)
    count = _SumOverProcesses.apply(x.new_tensor([x.numel() / x.size(1)]))
    mean = _SumOverProcesses.apply(x.sum((0, 2, 3))) / count  # (C,)
    centred = x - mean[:, None, None]
    var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    normed = centred * scale[:, None, None]
    return (normed if bias is None else normed + bias[:, None, None]).to(dtype)


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
