"""BatchNorm recalibration: give a chosen subnet the statistics of its own activations."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from torch.utils.data import DataLoader

from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d


@torch.no_grad()
def recalibrate(net: nn.Module, loader: DataLoader, device: torch.device, n_batches: int | None = None) -> None:
    """Replace every running mean and variance by the average over `n_batches` (None: all) of a loader."""
    norms = [module for module in net.modules() if isinstance(module, ElasticBatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    was_training = net.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    net.train()
    for images, _ in islice(loader, n_batches):
        net(images.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.train(was_training)
