"""Layers with quantizers, and functions on all quantizers of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from apq.errors import UserError
from elastic_nn.modules.batch_dropout import BatchDropout
from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.quantizers import NoQuantizer, Quantizer, QuantScheme


class QuantizedLayer:
    """Mixin for layers whose weights and inputs pass through quantizers (`NoQuantizer` in full precision)."""

    weight: nn.Parameter
    weight_quant: Quantizer
    act_quant: Quantizer

    def set_quantizers(self, scheme: QuantScheme, *, signed_input: bool, quantize_input: bool = True) -> None:
        """Give the layer new quantizers. `quantize_input=False` leaves the input in full precision, as for images."""
        self.weight_quant = scheme.weight()
        self.act_quant = scheme.activation(signed_input) if quantize_input else NoQuantizer()

    def operands(self) -> dict[str, Quantizer]:
        """The quantizers of the quantized operands, by "weight_quant" and "act_quant"."""
        both = {"weight_quant": self.weight_quant, "act_quant": self.act_quant}
        return {kind: quantizer for kind, quantizer in both.items() if quantizer.quantizes}

    def set_bits(self, w_bits: int, a_bits: int) -> None:
        """Set the bits of weights and inputs. Operands in full precision ignore them."""
        self.weight_quant.bits, self.act_quant.bits = w_bits, a_bits

    def active_weight(self, in_channels: int) -> Tensor:
        """The full-precision weights in use for inputs with `in_channels` channels; by default all weights."""
        return self.weight


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution with quantizers. `quantize_input=False` leaves the input in full precision, as for images."""

    def __init__(
        self, *args: Any, scheme: QuantScheme, signed_input: bool = False, quantize_input: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_quantizers(scheme, signed_input=signed_input, quantize_input=quantize_input)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, by which a network may call the layer
        return self._conv_forward(self.act_quant(input), self.weight_quant(self.weight), self.bias)


class QuantLinear(QuantizedLayer, nn.Linear):
    """Fully connected layer with quantizers."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        *,
        bias: bool = True,
        signed_input: bool = False,
        quantize_input: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.set_quantizers(scheme, signed_input=signed_input, quantize_input=quantize_input)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name; (..., C) -> (..., D)
        return F.linear(self.act_quant(input), self.weight_quant(self.weight), self.bias)


def quantized_layers(net: nn.Module) -> dict[str, QuantizedLayer]:
    """Every `QuantizedLayer` by its path, in module order."""
    return {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLayer)}


def quantizers(net: nn.Module) -> list[Quantizer]:
    """The quantizers of all quantized operands, in module order, weights before inputs."""
    return [quantizer for layer in quantized_layers(net).values() for quantizer in layer.operands().values()]


def learned_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The ranges, steps and offsets that the quantizers of a network learn."""
    found = (parameter for quantizer in _all_quantizers(net) for parameter in quantizer.learned_parameters())
    return list(dict.fromkeys(found))


def relative_parameters(net: nn.Module) -> dict[nn.Parameter, float]:
    """Those of `learned_parameters` that training moves by fractions of their size, each with its usual size."""
    return {p: usual for quantizer in _all_quantizers(net) for p, usual in quantizer.relative_parameters().items()}


def quantizer_keys(net: nn.Module) -> set[str]:
    """Keys of all quantizers' tensors in the state dict of the network."""
    operands = (
        (f"{name}.{kind}.", quantizer)
        for name, layer in quantized_layers(net).items()
        for kind, quantizer in layer.operands().items()
    )
    return {prefix + key for prefix, quantizer in operands for key in quantizer.state_dict()}


def name_quantizers(net: nn.Module) -> None:
    """Set the `label` of every quantizer to its layer, for messages.

    Whatever puts quantizers into a network calls it once, as its last step: `MBConvNet` and `quantize_model`.
    """
    for name, layer in quantized_layers(net).items():
        for operand in layer.operands().values():
            for quantizer in _all_quantizers(operand):
                quantizer.label = name.removesuffix(".conv")


@contextlib.contextmanager
def quantizers_off(net: nn.Module) -> Iterator[None]:
    """Context in which the network runs in full precision."""
    with _attribute(quantizers(net), "enabled", False):
        yield


@contextlib.contextmanager
def collecting(net: nn.Module) -> Iterator[None]:
    """Context in which quantizers collect the statistics that they need from the inputs of the network."""
    parts = [quantizer for quantizer in _all_quantizers(net) if quantizer.needs_statistics]
    try:
        for quantizer in parts:
            quantizer.begin_statistics()
        yield
    finally:
        for quantizer in parts:
            quantizer.end_statistics()


@contextlib.contextmanager
def shared_batch(net: nn.Module, world_size: int) -> Iterator[None]:
    """Context in which BatchNorm, quantizers and dropout see the images of all processes as one batch.

    UserError for a norm whose statistics processes cannot share.
    """
    if world_size == 1:
        yield
        return
    norms = [module for module in net.modules() if isinstance(module, ElasticBatchNorm2d)]
    synchronising = (ElasticBatchNorm2d,)
    if any(parameter.device.type != "cpu" for parameter in net.parameters()):
        synchronising = (ElasticBatchNorm2d, nn.SyncBatchNorm)  # torch's own needs a GPU
    for name, module in net.named_modules():
        takes = isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.running_mean is not None)
        if takes and not isinstance(module, synchronising):
            raise UserError(
                f"layer {name} is a {type(module).__name__}, whose statistics {world_size} processes cannot share: "
                "train in one process"
            )
    dropouts = [module for module in net.modules() if isinstance(module, BatchDropout)]
    with _attribute([*norms, *_all_quantizers(net), *dropouts], "synchronised", True):
        yield


@contextlib.contextmanager
def part_of_batch(net: nn.Module, share: float) -> Iterator[None]:
    """Context in which a forward pass has only `share` (0 to 1) of the images of a training step.

    The quantizers of inputs need this: the gradients of learned steps must not depend on how a batch is cut.
    """
    if share == 1:
        yield
        return
    inputs = [quantizer for layer in quantized_layers(net).values() for quantizer in _all_quantizers(layer.act_quant)]
    with _attribute(inputs, "share", share):
        yield


def _all_quantizers(net: nn.Module) -> list[Quantizer]:
    """Every quantizer, also those inside another one."""
    return [module for module in net.modules() if isinstance(module, Quantizer)]


@contextlib.contextmanager
def _attribute(modules: Iterable[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Context in which an attribute of modules has another value."""
    before = [(module, getattr(module, name)) for module in modules]
    try:
        for module, _ in before:
            setattr(module, name, value)
        yield
    finally:
        for module, old in before:
            setattr(module, name, old)
