"""Recalibration: statistics of a chosen subnet's own activations, for BatchNorm and for quantizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.modules.quant_layers import collecting, quantizers
from elastic_nn.training.engine import to_device

RECALIBRATION_BATCH = 64


@torch.no_grad()
def recalibrate(net: nn.Module, loader: DataLoader, device: torch.device, n_images: int | None = None) -> None:
    """Replace BatchNorm's statistics, and the ranges of quantizers that need statistics, by averages over a pass.

    The pass is over the first `n_images` of a loader (None: all), in whole batches, weighted by numbers of images.
    Each batch is normalised and quantized by its own statistics.
    """
    norms = [module for module in net.modules() if isinstance(module, ElasticBatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    _pass(net, loader, device, n_images, norms)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def collect_ranges(net: nn.Module, loader: DataLoader, device: torch.device, n_images: int | None = None) -> None:
    """Replace the ranges of quantizers that need statistics, in evaluation mode, after training.

    A network without such quantizers is not run.
    """
    if any(quantizer.needs_statistics for quantizer in quantizers(net)):
        _pass(net, loader, device, n_images, [])


def _pass(
    net: nn.Module,
    loader: DataLoader,
    device: torch.device,
    n_images: int | None,
    norms: Sequence[ElasticBatchNorm2d],
) -> None:
    """Run the network on the images and collect the statistics of its quantizers and of `norms`."""
    was_training, seen = net.training, 0
    net.train(bool(norms))
    try:
        with collecting(net):
            for images, _ in loader:
                if n_images is not None and seen >= n_images:
                    break
                seen += len(images)
                for norm in norms:
                    norm.momentum = len(images) / seen  # weight of a new batch in a cumulative average
                net(to_device(images, device))
    finally:
        net.train(was_training)
