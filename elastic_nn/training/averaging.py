"""The moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(net: nn.Module, decay: float | None) -> AveragedModel | None:
    """An exponential moving average of a network's weights and statistics, to be updated after each step.

    Whole numbers, such as the clusters that weights belong to, have no average: the latest ones count.
    """
    if decay is None:
        return None
    moving_average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def average(averages: list[Tensor], latest: list[Tensor], n_averaged: Tensor | int) -> None:  # of one dtype
        if averages[0].is_floating_point():
            moving_average(averages, latest, n_averaged)
        else:
            torch._foreach_copy_(averages, latest)

    return AveragedModel(net, multi_avg_fn=average, use_buffers=True)
