"""A batch that processes share, put together again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rows_of_all(rows: Tensor) -> Tensor:
    """(N, C) rows of all processes in the order of their batch, of which each has every so manyth: (n, C) its own."""
    world, counts = dist.get_world_size(), torch.tensor([len(rows)], device=rows.device)
    dist.all_reduce(total := counts.clone())
    most = -(-int(total) // world)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])  # shares may differ by one
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[: int(total)]
