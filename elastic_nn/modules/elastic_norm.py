"""BatchNorm over however many channels arrive."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ElasticBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises an input of C channels with its first C scales, shifts and statistics.

    The statistics of a supernet mix those of all subnets it was trained with: recalibrate after choosing one.
    """

    def forward(self, x: Tensor) -> Tensor:
        channels = x.size(1)
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            self.running_mean[:channels],
            self.running_var[:channels],
            self.weight[:channels],
            self.bias[:channels],
            self.training,
            self.momentum,
            self.eps,
        )

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Any number of channels up to `num_features` is fine."""
