"""Recalibration: give a chosen subnet the statistics of its own activations, BatchNorm's and BatchQuant's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.modules.quant_layers import batch_quantizers
from elastic_nn.training.engine import to_device

RECALIBRATION_BATCH = 64


@torch.no_grad()
def recalibrate(net: nn.Module, loader: DataLoader, device: torch.device, n_images: int | None = None) -> None:
    """Replace every running mean and variance by the average over a loader's first `n_images` or all of them, and so
    the ranges of BatchQuant; in the pass each batch is normalised and quantized by its own.

    Whole batches are taken, and each counts by its images: a short last one does not weigh as much as a full one.
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
    """Replace the ranges of BatchQuant alone, in evaluation mode: what training has changed since they were collected.

    A network without such quantizers is not run.
    """
    if batch_quantizers(net):
        _pass(net, loader, device, n_images, [])


def _pass(
    net: nn.Module,
    loader: DataLoader,
    device: torch.device,
    n_images: int | None,
    norms: Sequence[ElasticBatchNorm2d],
) -> None:
    """Run the network on the images, while it collects the ranges of its inputs and the statistics of `norms`.

    Ranges that ran through training, as BatchNorm's do elsewhere, belong to no subnet and stay.
    """
    was_training, seen = net.training, 0
    net.train(bool(norms))
    quantizers = batch_quantizers(net)
    for quantizer in quantizers:
        if quantizer.momentum is None or not quantizer.calibrated:
            quantizer.forget()
            quantizer.collecting = True
        else:
            quantizer.eval()
    try:
        for images, _ in loader:
            if n_images is not None and seen >= n_images:
                break
            seen += len(images)
            for norm in norms:
                norm.momentum = len(images) / seen  # new share of a cumulative average
            net(to_device(images, device))
    finally:
        for quantizer in quantizers:
            quantizer.collecting = False
        net.train(was_training)
