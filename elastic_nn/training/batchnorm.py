"""Recalibration: statistics of a chosen network's own activations, for norms and for quantizers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from apq.errors import UserError
from dataset.splits import Batches, Splits, make_loader
from elastic_nn.modules.quant_layers import collecting, quantizers
from elastic_nn.training.engine import to_device

RECALIBRATION_BATCH = 64
STATISTICS_AT = {  # at which place functions of torch take a running mean; the running variance follows it
    F.batch_norm: 1,
    F.instance_norm: 1,
    torch.batch_norm: 3,
    torch.instance_norm: 3,
    torch.native_batch_norm: 3,
}


def recalibration_batches(
    splits: Splits, sides: tuple[int, ...], device: torch.device, n_images: int | None = None
) -> Batches:
    """The batches for `recalibrate`: training images without random augmentation, the first `n_images` (None: all)."""
    return make_loader(splits.calibration, RECALIBRATION_BATCH, sides=sides, device=device, n_images=n_images)


@torch.no_grad()
def recalibrate(net: nn.Module, loader: Batches, device: torch.device, n_images: int | None = None) -> None:
    """Replace the statistics of norms, and the ranges of quantizers that need statistics, by averages over a pass.

    The pass is over the first `n_images` of a loader (None: all), in whole batches, weighted by numbers of images.
    Each batch is normalised and quantized by its own statistics. Norms alone are in training mode: dropout and all
    else run as in evaluation. Every norm of torch that keeps statistics is recalibrated; a norm that runs several times
    in a pass averages over all runs, and one that does not run keeps its statistics.

    UserError for layers that keep statistics in another way, for statistics that are used outside of their norm, and
    for batches of one image. After any exception the network is as it was.
    """
    norms = _norms(net)
    with (
        _put_back(net),
        _not_compiled(),
        _norms_alone_train(net, norms),
        _Averages(norms) as averages,
        collecting(net),
        _Watch(net, averages.running),
    ):
        for images in _first(loader, device, n_images):
            if norms and len(images) < 2:
                raise UserError("norms cannot be recalibrated on a batch of one image: give more images")
            averages.n_images = len(images)
            net(images)


@torch.no_grad()
def collect_ranges(net: nn.Module, loader: Batches, device: torch.device, n_images: int | None = None) -> None:
    """Replace the ranges of quantizers that need statistics, in evaluation mode, after training.

    A network without such quantizers is not run.
    """
    if any(quantizer.needs_statistics for quantizer in quantizers(net)):
        with _norms_alone_train(net, {}), collecting(net):
            for images in _first(loader, device, n_images):
                net(images)


def _first(loader: Batches, device: torch.device, n_images: int | None) -> Iterator[Tensor]:
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
        elif "running_mean" in dict(module.named_buffers(recurse=False)) and not _frozen(module):
            raise UserError(f"layer {name} is a {type(module).__name__}, whose statistics cannot be recalibrated")
    return norms


def _frozen(module: nn.Module) -> bool:
    if "torchvision" not in sys.modules:  # so that the network has none of its layers: it is slow to import
        return False
    from torchvision.ops import FrozenBatchNorm2d

    return isinstance(module, FrozenBatchNorm2d)


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
        self.running: list[_NormBase] = []
        self.afterwards = contextlib.ExitStack()

    def __enter__(self) -> _Averages:
        for norm in self.norms.values():
            self.afterwards.callback(setattr, norm, "momentum", norm.momentum)
            self.afterwards.callback(norm.register_forward_pre_hook(self._weigh).remove)
            self.afterwards.callback(norm.register_forward_hook(self._leave).remove)
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
        self.running.append(norm)

    def _leave(self, norm: _NormBase, args: tuple[Tensor, ...], output: Any) -> None:
        self.running.pop()


class _Watch(TorchFunctionMode):
    """Context with UserError where a function of torch takes running statistics of no norm that is `running`."""

    def __init__(self, net: nn.Module, running: Sequence[_NormBase]) -> None:
        super().__init__()
        self.net, self.running = net, running

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in STATISTICS_AT:
            first = STATISTICS_AT[func]
            for value in (*args[first : first + 2], kwargs.get("running_mean"), kwargs.get("running_var")):
                if value is not None:
                    self._check(value)
        return func(*args, **kwargs)

    def _check(self, value: Tensor) -> None:
        """UserError unless these are statistics of a running norm, or what it made of them."""
        own = [tensor for norm in self.running for tensor in norm.buffers(recurse=False)]
        if any(_shares(tensor, value) for tensor in own):
            return
        named = [*self.net.named_buffers(), *self.net.named_parameters()]
        name = next((name for name, tensor in named if _shares(tensor, value)), None)
        if name is not None or not self.running:
            what = "a tensor that is no buffer" if name is None else name
            raise UserError(f"{what} cannot be recalibrated: the network normalises by it outside of a norm's forward")


def _shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of the same memory, such as one and a part of it."""
    return not is_lazy(one) and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _not_compiled() -> contextlib.AbstractContextManager:
    """Context in which compiled layers run as they were written: what they call is seen by `_Watch`."""
    if "torch._dynamo" not in sys.modules:  # which is slow to import, and nothing is compiled without it
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _put_back(net: nn.Module) -> Iterator[None]:
    """Context after which buffers and flags of all layers are as they were, if it ends by an exception."""
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers() if not is_lazy(buffer)]
    flags = [
        (module, {name: value for name, value in vars(module).items() if value is None or isinstance(value, bool)})
        for module in net.modules()
    ]
    try:
        yield
    except BaseException:
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, own in flags:
            vars(module).update(own)
        raise
