"""Proof that a quantized network runs as it is priced: every layer through its quantizers, and no other weights."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from apq.errors import UserError
from elastic_nn.modules.quant_layers import quantized_layers, quantizers_off
from lut.traced import TracedCall, traced_calls


def check_quantized(net: nn.Module, names: Sequence[str], image_shape: Sequence[int]) -> None:
    """UserError unless a run multiplies the weights of the named layers alone, each time through their quantizers.

    The network runs once, in evaluation mode, on meta tensors: `image_shape` is (C, H, W), H = W. What it may run
    beside its layers is in `lut.operations`.
    """
    through_weights, through_inputs = _Passed(), Counter[str]()
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(quantizers_off(net))
        for name, layer in quantized_layers(net).items():

            def pass_weight(_: nn.Module, __: Any, output: Tensor, name: str = name) -> Tensor:
                return through_weights.marked(name, output)

            def pass_input(_: nn.Module, __: Any, ___: Tensor, name: str = name) -> None:
                through_inputs[name] += 1

            afterwards.callback(layer.weight_quant.register_forward_hook(pass_weight).remove)
            afterwards.callback(layer.act_quant.register_forward_hook(pass_input).remove)
        calls = traced_calls(net, image_shape[-1], image_shape[0])
    for call in calls:
        _check_call(net, call, through_weights.name_of(call.weight))
    runs = Counter(call.layer.name for call in calls)
    for name in runs:
        if name not in names:
            raise UserError(f"layer {name} multiplies weights, but the policy has no bits for it")
        if through_inputs[name] != runs[name]:
            raise UserError(
                f"layer {name} runs {runs[name]} times, its inputs are quantized {through_inputs[name]} times"
            )
    if still := [name for name in names if name not in runs]:
        raise UserError(f"layer {still[0]} has bits in the policy, but does not run")


class _Passed:
    """The tensors that came out of quantizers. Each is an object of its own, so that it is known where it is used."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[str, Tensor]] = {}

    def marked(self, name: str, tensor: Tensor) -> Tensor:
        mark = tensor.view_as(tensor)
        self._tensors[id(mark)] = name, mark
        return mark

    def name_of(self, tensor: Tensor) -> str | None:
        return self._tensors.get(id(tensor), (None, None))[0]


def _check_call(net: nn.Module, call: TracedCall, quantized_by: str | None) -> None:
    """UserError unless the weights passed the quantizer of the module that was running."""
    where = call.layer.name
    if quantized_by is None:
        known = (name for name, parameter in net.named_parameters() if parameter is call.weight)
        what = next(known, "weights of a layer that is not registered as a module")
        raise UserError(f"{where or type(net).__name__} multiplies {what} without a quantizer: it cannot be quantized")
    if quantized_by != where:
        raise UserError(
            f"layer {quantized_by} runs within {where or type(net).__name__} by its forward method alone: call it"
        )
