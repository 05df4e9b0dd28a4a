"""Networks without weights: their shapes are compared with a file before memory is taken for numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from apq.checkpoint import check_fit

Net = TypeVar("Net", bound=nn.Module)
DRAWING = (Tensor.normal_, Tensor.uniform_)  # what initial weights are made with


class _EmptyOnMeta(TorchFunctionMode):
    """Context in which `torch.empty`, by which layers take memory for their weights, takes none.

    Nothing is drawn for tensors without numbers: torch takes milliseconds a layer for that.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DRAWING and args[0].is_meta:
            return args[0]
        return func(*args, **({**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}))


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Context in which new networks are on torch's meta device: parameters and buffers have shapes, but no numbers.

    Drawing their initial weights changes no random generator. Other tensors, with which constructors calculate, are
    real, so that networks whose constructors look at numbers can be built.
    """

    def parameter(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        return None if value is None else nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)

    def buffer(module: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to("meta")

    hooks = register_module_parameter_registration_hook(parameter), register_module_buffer_registration_hook(buffer)
    try:
        with torch.random.fork_rng(devices=[]), _EmptyOnMeta():  # some constructors draw before they register
            yield
    finally:
        for hook in hooks:
            hook.remove()


def built_for(build: Callable[[], Net], weights: Any) -> Net:
    """The network that `build` makes, with `weights`. UserError, before memory is taken for it, if they do not fit."""
    with without_weights():
        expected = build().state_dict()
    check_fit(weights, expected)
    net = build()
    net.load_state_dict(weights)
    return net
