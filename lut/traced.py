"""The convolutions and linear layers of any torch module, traced by running it once on a square image.

Calls of torch's functions (`conv2d`, `linear`, `batch_norm`) are recorded, so the classes of the layers do not matter.
Whatever else multiplies and adds up is refused, see `lut.operations`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apq.errors import UserError
from apq.layers import FIXED_BITS, ConvLayer
from lut.operations import OperationWatch

CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight")
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)


@dataclass(frozen=True)
class TracedCall:
    """One run of a layer. `weight` is the tensor that it multiplied."""

    layer: ConvLayer
    weight: Tensor


def traced_layers(
    net: nn.Module, resolution: int, *, in_channels: int = 3, w_bits: int = FIXED_BITS, a_bits: int = FIXED_BITS
) -> list[ConvLayer]:
    """Every convolution and linear layer that the network runs on one image, in order, all at the same bits.

    A linear layer is a 1x1 convolution over the positions it runs at. A layer that runs twice is listed twice, the
    second time as `shared`. Extract a subnet from its supernet first: the supernet's kernel transforms are linear
    layers too. UserError names the first layer that is not a square convolution or a linear layer, such as attention,
    and whatever else multiplies and adds up.
    """
    calls = traced_calls(net, resolution, in_channels)
    return [replace(call.layer, w_bits=w_bits, a_bits=a_bits) for call in calls]


def traced_calls(net: nn.Module, resolution: int, in_channels: int) -> list[TracedCall]:
    """The runs of all layers in evaluation mode, in order. Nothing is computed, on any device. UserError as above."""
    _check_plain(net)
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    image = torch.zeros(1, in_channels, resolution, resolution, device="meta", dtype=dtype)
    names = [""]
    watch = OperationWatch(net, image, lambda why: _refusal(net, names, why))
    recorder = _Recorder(names, watch)
    try:
        with _restoring(net), _evaluating(net), _naming(net, names), torch.no_grad(), watch, recorder:
            net(image)
    except UserError:
        raise
    except Exception as error:  # the network is not ours: it may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        size = f"{in_channels} x {resolution} x {resolution}"
        raise UserError(f"{type(net).__name__} does not run on an image of {size}: {reason}") from error
    return recorder.calls


class EmptyWeights(TorchFunctionMode):
    """Context in which modules are built without memory and initial values. Move them to "meta" afterwards.

    Unlike torch.device("meta") it leaves alone the tensors from which some models compute their widths.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {}, **({"device": "meta"} if func is torch.empty else {}))
        return func(*args, **given)


class _Recorder(TorchFunctionMode):
    """Appends each layer that runs to `calls`. The last of `names` is the running module."""

    def __init__(self, names: list[str], watch: OperationWatch) -> None:
        super().__init__()
        self.calls: list[TracedCall] = []
        self._names, self._watch = names, watch
        self._output: Tensor | None = None  # of the latest layer: a BatchNorm of it belongs to that layer
        self._stored: dict[int, Tensor] = {}  # parameters by id, kept alive because ids of freed tensors are reused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, is_layer = kwargs or {}, func in (torch.conv2d, F.linear)
        given = dict(zip(CONV_ARGUMENTS, args, strict=False)) | kwargs if is_layer else {}
        if func is torch.conv2d:
            self._check_channels(**given)
        self._watch.in_layer, self._watch.running = is_layer, getattr(func, "__name__", str(func))
        try:
            result = self._watch.call(func, args, kwargs)
        finally:
            self._watch.in_layer, self._watch.running = False, ""
        if is_layer:
            self._append(result, given, func is torch.conv2d)
        elif func in (F.batch_norm, torch.batch_norm):
            given = dict(zip(NORM_ARGUMENTS, args, strict=False)) | kwargs
            if given["input"] is self._output and given.get("weight") is not None and self._is_new(given["weight"]):
                last = self.calls[-1]
                self.calls[-1] = replace(last, layer=replace(last.layer, norm=True))
        return result

    def _append(self, output: Tensor, given: dict[str, Any], conv: bool) -> None:
        weight, bias = given["weight"], given.get("bias")
        if self._watch.of_image(weight):
            raise self._watch.refusal("its weights are computed from the image")
        if weight.is_complex() or output.is_complex():
            raise self._watch.refusal("it multiplies complex numbers")
        shared = not self._is_new(weight)
        layer = ConvLayer(
            *(self._conv_shape(output, **given) if conv else self._linear_shape(output, **given)),
            *(FIXED_BITS, FIXED_BITS),
            image_input=conv and not self.calls,
            norm=False,
            bias=bias is not None and self._is_new(bias),
            shared=shared,
            name=self._names[-1],
            linear=not conv,
        )
        macs = weight.numel() * output.numel() // layer.out_channels
        if macs != layer.macs:  # for example, more than one image
            raise self._watch.refusal(f"it does {macs} multiply-accumulates, not the {layer.macs} of its shape")
        self.calls.append(TracedCall(layer, weight))
        self._output = output

    def _check_channels(self, **given: Any) -> None:
        """ValueError that says more than torch does on meta tensors."""
        takes, gets = given["weight"].shape[1] * given.get("groups", 1), given["input"].shape[-3]
        if takes != gets:
            raise ValueError(f"layer {self._names[-1]} takes {takes} channels and gets {gets}")

    def _conv_shape(self, output: Tensor, **given: Any) -> tuple[int, ...]:
        """The first six fields of the ConvLayer."""
        out_channels, group_channels, *kernel = given["weight"].shape
        kernel_size = self._square("kernel", kernel)
        stride = self._square("stride", given.get("stride", 1))
        if kernel_size > 1 and self._square("dilation", given.get("dilation", 1)) > 1:
            raise self._watch.refusal("its dilation is not 1")
        side = self._square("input", given["input"].shape[-2:])
        out_side = self._square("output", output.shape[-2:])
        if math.ceil(side / stride) != out_side:  # other than "same" padding: see ConvLayer
            side = out_side * stride
        groups = given.get("groups", 1)
        return group_channels * groups, out_channels, side, kernel_size, stride, groups

    def _linear_shape(self, output: Tensor, **given: Any) -> tuple[int, ...]:
        """The first six fields of the ConvLayer."""
        if given["weight"].dim() != 2:
            raise self._watch.refusal("its weights are not a matrix")
        out_features, in_features = given["weight"].shape
        positions = output.numel() // out_features
        side = math.isqrt(positions)
        if side**2 != positions:
            raise self._watch.refusal(f"it runs at {positions} positions, which are not a square map")
        return in_features, out_features, side, 1, 1, 1

    def _is_new(self, parameter: Tensor) -> bool:
        known = id(parameter) in self._stored
        self._stored[id(parameter)] = parameter
        return not known

    def _square(self, what: str, size: int | Iterable[int]) -> int:
        sides = (size,) if isinstance(size, int) else tuple(size)
        if len(set(sides)) > 1:
            raise self._watch.refusal(f"its {what} is {' x '.join(map(str, sides))}, not square")
        return sides[0]


def _refusal(net: nn.Module, names: list[str], why: str) -> UserError:
    running = f"layer {names[-1]}" if names[-1] else f"the network itself (class {type(net).__name__})"
    return UserError(f"cannot list {running}: {why}")


def _check_plain(net: nn.Module) -> None:
    """UserError for networks whose layers run outside Python, or as copies of themselves."""
    for name, module in net.named_modules():
        compiled = "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, WRAPPERS):
            what = "compiled" if compiled else f"wrapped in {type(module).__name__}"
            raise UserError(f"{f'module {name}' if name else 'the network'} is {what}: hand over the plain module")


@contextlib.contextmanager
def _restoring(net: nn.Module) -> Iterator[None]:
    """Take back the tensors that the block assigns to modules, such as one that a network keeps for its next run.

    Lists and dicts that modules hold, buffers and parameters among them, get their former entries.
    """
    states = [(vars(module), dict(vars(module))) for module in net.modules()]
    held = [value for _, before in states for value in before.values() if isinstance(value, (dict, list, set))]
    copies = [(value, list(value.items()) if isinstance(value, dict) else list(value)) for value in held]
    try:
        yield
    finally:
        for now, before in states:
            for name in [name for name, value in now.items() if isinstance(value, Tensor)]:
                if name not in before:
                    del now[name]
                elif now[name] is not before[name]:
                    now[name] = before[name]
        for value, entries in copies:
            value.clear()
            value.extend(entries) if isinstance(value, list) else value.update(entries)


@contextlib.contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _naming(net: nn.Module, names: list[str]) -> Iterator[None]:
    """Keep the path of the running module at the end of `names`."""
    hooks = []
    for name, module in net.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: names.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: names.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
