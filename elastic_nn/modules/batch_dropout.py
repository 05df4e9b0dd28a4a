"""Dropout that does not depend on the number of processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchDropout(nn.Dropout):
    """Dropout whose mask is drawn for the whole batch, also where processes share it.

    Random numbers come from torch's generator of the CPU. Every process draws the same ones, and takes its rows: of
    `world` processes, process r has the images r, r + world, r + 2 world, ... of a batch.
    """

    synchronised = False  # True: the images of all processes are one batch

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name; (N, ...) -> same
        if not self.training or self.p == 0:
            return input
        n, rank, world = len(input), 0, 1
        if self.synchronised:
            rank, world = dist.get_rank(), dist.get_world_size()
            dist.all_reduce(total := torch.tensor([n], device=input.device))
            n = int(total)
        kept = torch.rand(n, *input.shape[1:])[rank::world] >= self.p
        return input * kept.to(input.device, non_blocking=True) / (1 - self.p)
