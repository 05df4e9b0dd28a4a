"""Right predictions, counted over batches and processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elastic_nn.training.distributed import sum_over
from elastic_nn.training.session import Execution


class Hits(NamedTuple):
    """Top-1 and top-5 as fractions (0 to 1)."""

    top1: float
    top5: float


class Tally:
    """Counts right predictions as they come, on the device: no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # top-1 hits, top-5 hits, images

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (N, classes) and labels (N,)."""
        hits = logits.topk(min(5, logits.size(1)), dim=1).indices == labels[:, None]  # (N, 5)
        self.sums[:2] += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
        self.sums[2] += len(labels)

    def total(self, execution: Execution) -> tuple[Hits, int]:
        """The hits of all processes as fractions, and their number of images. Without images all are 0."""
        top1, top5, n = sum_over(self.sums, execution).tolist()
        return Hits(top1 / max(n, 1), top5 / max(n, 1)), int(n)
