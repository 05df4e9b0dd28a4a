"""Recalibration: statistics of a chosen network's own activations, for norms and for quantizers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader
from torchvision.ops import FrozenBatchNorm2d

from apq.errors import UserError
from elastic_nn.modules.quant_layers import collecting, quantizers
from elastic_nn.training.engine import to_device

RECALIBRATION_BATCH = 64


@torch.no_grad()
def recalibrate(net: nn.Module, loader: DataLoader, device: torch.device, n_images: int | None = None) -> None:
    """Replace the statistics of norms, and the ranges of quantizers that need statistics, by averages over a pass.

    The pass is over the first `n_images` of a loader (None: all), in whole batches, weighted by numbers of images.
    Each batch is normalised and quantized by its own statistics. Norms alone are in training mode: dropout and all
    else run as in evaluation. Every norm of torch that keeps statistics is recalibrated; a norm that runs several times
    in a pass averages over all runs, and one that does not run keeps its statistics.

    UserError for layers that keep statistics in another way, and for batches of one image.
    """
    norms = _norms(net)
    with _norms_alone_train(net, norms), _Averages(norms) as averages, collecting(net):
        for images in _first(loader, device, n_images):
            if norms and len(images) < 2:
                raise UserError("norms cannot be recalibrated on a batch of one image: give more images")
            averages.n_images = len(images)
            net(images)


@torch.no_grad()
def collect_ranges(net: nn.Module, loader: DataLoader, device: torch.device, n_images: int | None = None) -> None:
    """Replace the ranges of quantizers that need statistics, in evaluation mode, after training.

    A network without such quantizers is not run.
    """
    if any(quantizer.needs_statistics for quantizer in quantizers(net)):
        with _norms_alone_train(net, {}), collecting(net):
            for images in _first(loader, device, n_images):
                net(images)


def _first(loader: DataLoader, device: torch.device, n_images: int | None) -> Iterator[Tensor]:
    """The batches of a loader, until `n_images` are seen. UserError if there are none."""
    seen = 0
    for images, _ in loader:
        if n_images is not None and seen >= n_images:
            break
        if len(images):
            seen += len(images)
            yield to_device(images, device)
    if not seen:
        raise UserError("there are no images to recalibrate on")


def _norms(net: nn.Module) -> dict[str, _NormBase]:
    """The norms with running statistics, by their path. UserError for other layers that have such statistics.

    A FrozenBatchNorm2d has them as constants.
    """
    norms = {}
    for name, module in net.named_modules():
        if isinstance(module, _NormBase):
            if module.running_mean is not None:
                norms[name] = module
        elif "running_mean" in dict(module.named_buffers(recurse=False)) and not isinstance(module, FrozenBatchNorm2d):
            raise UserError(f"layer {name} is a {type(module).__name__}, whose statistics cannot be recalibrated")
    return norms


@contextlib.contextmanager
def _norms_alone_train(net: nn.Module, norms: dict[str, _NormBase]) -> Iterator[None]:
    """Context in which only these norms are in training mode, not even what is inside them."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms.values():
            norm.training = True
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Averages(contextlib.AbstractContextManager):
    """Context in which the statistics of norms are averages over their runs, weighted by `n_images` of each run.

    An average starts anew at the first run. UserError at the end for a norm that ran and has none.
    """

    def __init__(self, norms: dict[str, _NormBase]) -> None:
        self.norms, self.n_images = norms, 0
        self.seen: dict[_NormBase, int] = {}
        self.afterwards = contextlib.ExitStack()

    def __enter__(self) -> _Averages:
        for norm in self.norms.values():
            self.afterwards.callback(setattr, norm, "momentum", norm.momentum)
            self.afterwards.callback(norm.register_forward_pre_hook(self._weigh).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.afterwards.close()
        for name, norm in self.norms.items() if kind is None else ():
            if norm in self.seen and not norm.running_mean.any() and (norm.running_var == 1).all():
                raise UserError(f"layer {name} is a {type(norm).__name__}, which does not average its statistics")

    def _weigh(self, norm: _NormBase, args: tuple[Tensor, ...]) -> None:
        if norm not in self.seen:
            norm.reset_running_stats()
        self.seen[norm] = self.seen.get(norm, 0) + self.n_images
        norm.momentum = self.n_images / self.seen[norm]
