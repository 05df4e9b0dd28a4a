"""The convolutions and linear layers of any torch module, traced by running it once on a square image.

Calls of torch's functions (`conv2d`, `linear`, `batch_norm`) are recorded, so the classes of the layers do not matter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from apq.errors import UserError
from apq.layers import FIXED_BITS, ConvLayer

CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight")


def traced_layers(
    net: nn.Module, resolution: int, *, in_channels: int = 3, w_bits: int = FIXED_BITS, a_bits: int = FIXED_BITS
) -> list[ConvLayer]:
    """Every convolution and linear layer that the network runs on one image, in order, all at the same bits.

    A linear layer is a 1x1 convolution over the positions it runs at. A layer that runs twice is listed twice, the
    second time as `shared`. The image is on the network's device; on "meta" nothing is computed. Extract a subnet from
    its supernet first: the supernet's kernel transforms are linear layers too. UserError names the first layer that is
    not a square convolution or a linear layer, such as attention.
    """
    like = next(net.parameters(), torch.zeros(()))
    image = torch.zeros(1, in_channels, resolution, resolution, device=like.device, dtype=like.dtype)
    names = [""]
    with FlopCounterMode(display=False) as counter:
        recorder = _Recorder((w_bits, a_bits), names, counter.get_total_flops)
        try:
            with _frozen(net), _naming(net, names), recorder:
                net(image)
        except UserError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            size = f"{in_channels} x {resolution} x {resolution}"
            raise UserError(f"{type(net).__name__} does not run on an image of {size}: {reason}") from error
    return recorder.layers


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
    """Appends each layer that runs to `layers`. The last of `names` is the running module."""

    def __init__(self, bits: tuple[int, int], names: list[str], flops: Callable[[], int]) -> None:
        super().__init__()
        self.layers: list[ConvLayer] = []
        self._bits, self._names, self._flops = bits, names, flops
        self._output: Tensor | None = None  # of the latest layer: a BatchNorm of it belongs to that layer
        self._stored: dict[int, Tensor] = {}  # parameters by id, kept alive because ids of freed tensors are reused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, before = kwargs or {}, self._flops()
        result = func(*args, **kwargs)
        macs = (self._flops() - before) // 2
        if func in (torch.conv2d, F.linear):
            given = dict(zip(CONV_ARGUMENTS, args, strict=False)) | kwargs
            shape = self._conv_shape(result, **given) if func is torch.conv2d else self._linear_shape(result, **given)
            self._append(result, given["weight"], given.get("bias"), shape, func is torch.conv2d)
            if macs != self.layers[-1].macs:  # for example, more than one image
                raise self._cannot(f"it does {macs} multiply-accumulates, not the {self.layers[-1].macs} of its shape")
        elif func in (F.batch_norm, torch.batch_norm):
            given = dict(zip(NORM_ARGUMENTS, args, strict=False)) | kwargs
            if given["input"] is self._output and given["weight"] is not None and self._is_new(given["weight"]):
                self.layers[-1] = replace(self.layers[-1], norm=True)
        elif macs:
            name = getattr(func, "__name__", str(func))
            raise self._cannot(f"it runs {name}; only 2-D convolutions and linear layers have costs")
        return result

    def _conv_shape(self, output: Tensor, **given: Any) -> tuple[int, ...]:
        """The first six fields of the ConvLayer."""
        out_channels, group_channels, *kernel = given["weight"].shape
        kernel_size = self._square("kernel", kernel)
        stride = self._square("stride", given.get("stride", 1))
        if kernel_size > 1 and self._square("dilation", given.get("dilation", 1)) > 1:
            raise self._cannot("its dilation is not 1")
        side = self._square("input", given["input"].shape[-2:])
        out_side = self._square("output", output.shape[-2:])
        if math.ceil(side / stride) != out_side:  # other than "same" padding: see ConvLayer
            side = out_side * stride
        groups = given.get("groups", 1)
        return group_channels * groups, out_channels, side, kernel_size, stride, groups

    def _linear_shape(self, output: Tensor, **given: Any) -> tuple[int, ...]:
        """The first six fields of the ConvLayer."""
        out_features, in_features = given["weight"].shape
        positions = output.numel() // out_features
        side = math.isqrt(positions)
        if side**2 != positions:
            raise self._cannot(f"it runs at {positions} positions, which are not a square map")
        return in_features, out_features, side, 1, 1, 1

    def _append(self, output: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], conv: bool) -> None:
        shared = not self._is_new(weight)
        has_bias = bias is not None and self._is_new(bias)
        layer = ConvLayer(
            *shape,
            *self._bits,
            image_input=conv and not self.layers,
            norm=False,
            bias=has_bias,
            shared=shared,
            name=self._names[-1],
        )
        self.layers.append(layer)
        self._output = output

    def _is_new(self, parameter: Tensor) -> bool:
        known = id(parameter) in self._stored
        self._stored[id(parameter)] = parameter
        return not known

    def _square(self, what: str, size: int | Iterable[int]) -> int:
        sides = (size,) if isinstance(size, int) else tuple(size)
        if len(set(sides)) > 1:
            raise self._cannot(f"its {what} is {' x '.join(map(str, sides))}, not square")
        return sides[0]

    def _cannot(self, why: str) -> UserError:
        return UserError(f"cannot list layer {self._names[-1] or 'without a name'}: {why}")


@contextlib.contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode and without gradients, which torch's FLOP counter cannot handle."""
    training = [module for module in net.modules() if module.training]
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    net.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad = True


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
