"""Estimates of the range of activations from one batch.

An estimator returns lowest and highest values in tensors of any shape, which a quantizer averages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_nn.quantizers.affine import affine_of_range, quantize_affine

Rows = Callable[[Tensor], Tensor]  # (n, C) rows of this process's images -> (N, C) of all processes'
RangeEstimator = Callable[[Tensor, int, Rows], tuple[Tensor, Tensor]]  # activations, bits -> lowest, highest values

GROUP = 64  # images whose extremes are taken together, as on each GPU of the published training
SAMPLE, TRIED = 1 << 16, 1 << 13  # most activations for a percentile, and for an error
STRIDE = 1_000_003  # a prime: the distance between these activations
PERCENT = 99.9  # percentage of activations that the percentile estimator keeps on each side
SHRUNK = tuple(i / 20 for i in range(20, 0, -1))  # fractions of the full range that the least-error estimator tries


def own_rows(rows: Tensor) -> Tensor:
    """The rows themselves, for a process that does not share its batches."""
    return rows


def rows_of_all(rows: Tensor) -> Tensor:
    """(N, C) rows of all processes, in the order of the batch that they share.

    `rows` (n, C) are those of this process. Of `world` processes, process r has the rows r, r + world, r + 2 world, ...
    """
    world, counts = dist.get_world_size(), torch.tensor([len(rows)], device=rows.device)
    dist.all_reduce(total := counts.clone())
    most = -(-int(total) // world)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])  # processes may differ by one row
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[: int(total)]


def channel_range(x: Tensor, bits: int, of_all: Rows = own_rows) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each channel of `x` (N, C, ...) in groups of about 64 images, both (groups, C).

    Extremes grow with the number of images, so groups make training and calibration comparable. They are groups of the
    whole batch, however many processes share it.

    >>> [edge.tolist() for edge in channel_range(torch.tensor([[-1.0, 2.0], [3.0, -4.0]]), 4)]
    [[[-1.0, -4.0]], [[3.0, 2.0]]]
    """
    low, high = (of_all(edge) for edge in (_extremes(x.flatten(2)) if x.ndim > 2 else (x, x)))
    groups = max(1, round(len(low) / GROUP))
    if len(low) % groups == 0:
        low, high = (edge.unflatten(0, (groups, -1)) for edge in (low, high))
        return low.amin(dim=1), high.amax(dim=1)
    return (
        torch.stack([part.amin(dim=0) for part in low.tensor_split(groups)]),
        torch.stack([part.amax(dim=0) for part in high.tensor_split(groups)]),
    )


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest values along the last dimension."""
    if x.device.type == "cpu":  # where both at once take a hundred times as long as one after the other
        return x.amin(-1), x.amax(-1)
    return x.aminmax(dim=-1)


def whole_channel_range(x: Tensor, bits: int, of_all: Rows = own_rows) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each channel over all images of this process, both (1, C), as in QFA's code.

    The range then grows with the images of a process. Several processes average theirs.
    """
    values = x.flatten(2) if x.ndim > 2 else x[:, :, None]  # (N, C, places)
    return values.amin((0, 2))[None], values.amax((0, 2))[None]


def percentile_range(x: Tensor, bits: int, of_all: Rows = own_rows) -> tuple[Tensor, Tensor]:
    """The range without the 0.1 % outermost values on each side."""
    kept = torch.tensor([1 - PERCENT / 100, PERCENT / 100], device=x.device)
    low, high = _thinned(x, SAMPLE).float().quantile(kept)
    return low, high


def least_error_range(x: Tensor, bits: int, of_all: Rows = own_rows) -> tuple[Tensor, Tensor]:
    """The fraction of the full range, in steps of 5 %, with the least squared error of rounding and clipping."""
    values = _thinned(x, TRIED).float()
    low, high = (edge * torch.tensor(SHRUNK, device=x.device)[:, None] for edge in values.aminmax())  # (candidates, 1)
    step, zero_point = affine_of_range(low, high, bits, signed=False)
    one, zero = torch.ones_like(low), torch.zeros_like(low)
    quantized = quantize_affine(values.expand(len(SHRUNK), -1), step, zero_point, one, zero, bits, signed=False)
    best = (quantized - values).square().mean(dim=1).argmin()
    return low[best, 0], high[best, 0]


def _thinned(x: Tensor, n: int) -> Tensor:
    """At most `n` values of a tensor, evenly spread over its images, channels and positions."""
    flat = x.detach().flatten()
    if flat.numel() <= n:
        return flat
    # A prime stride is not a multiple of a row or a map.
    return flat[torch.arange(n, device=x.device) * STRIDE % flat.numel()]
