"""Runs graphs in torch: as the network computes, or exactly, with whole numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from export.frozen import FrozenLayer
from export.graph import IMAGE, Graph, Node
from export.operations import OPERATIONS

EXACT = {torch.float32: 2**24, torch.float64: 2**53}  # whole numbers up to these have no gaps
Observe = Callable[[str, Tensor], None]


@torch.no_grad()
def run_as_trained(graph: Graph, images: Tensor) -> Tensor:
    """(N, classes) logits, computed as the network does: fake-quantized floats and norms. Of a graph as traced."""

    def compute(node: Node, values: list[Tensor]) -> Tensor:
        if node.layer is not None:
            inputs, (x,) = node.layer.inputs, values
            x = x if inputs is None else inputs.values(inputs.codes(x))
            return node.layer.run(x, node.layer.weights.values(), node.layer.bias)
        if node.norm is not None:
            norm = node.norm
            return F.batch_norm(*values, norm.mean, norm.variance, norm.weight, norm.bias, eps=norm.eps)
        return OPERATIONS[node.op].run(node.settings, *values)

    return _run(graph, images, compute)


@torch.no_grad()
def run_exactly(graph: Graph, images: Tensor, observe: Observe = lambda name, codes: None) -> Tensor:
    """(N, classes) float32 logits of a folded graph, computed with whole numbers where inputs and weights have codes.

    Sums of codes are exact. Each is rounded to float32, multiplied and added to, each time rounded once, as all
    runtimes round it. What has no codes is summed in float64 and then rounded. `observe` gets the name of each layer
    and the codes of its inputs.
    """

    def compute(node: Node, values: list[Tensor]) -> Tensor:
        if node.layer is None:
            return OPERATIONS[node.op].exact(node.settings, *values)
        (x,) = values
        if node.layer.inputs is not None:
            codes = node.layer.inputs.codes(x)
            observe(node.name, codes)
            if node.layer.whole:
                return scaled(node.layer, sums_of_codes(node.layer, codes), x.shape[2:])
            x = node.layer.inputs.values(codes)
        return scaled(node.layer, _in_double(node.layer, x), x.shape[2:])

    return _run(graph, images, compute)


def _run(graph: Graph, images: Tensor, compute: Callable[[Node, list[Tensor]], Tensor]) -> Tensor:
    """Run the nodes in order, and keep a value no longer than it is needed."""
    values, last = {IMAGE: images}, {}
    for node in graph.nodes:
        last.update(dict.fromkeys(node.inputs, node.name))
    for node in graph.nodes:
        values[node.name] = compute(node, [values[name] for name in node.inputs])
        for name in set(node.inputs):
            if last[name] == node.name:
                del values[name]
    return values[graph.output.name]


def accumulator(layer: FrozenLayer) -> torch.dtype:
    """The float type that holds all sums of codes of a layer exactly."""
    return torch.float32 if layer.largest_sum() <= EXACT[torch.float32] else torch.float64


def sums_of_codes(layer: FrozenLayer, codes: Tensor) -> Tensor:
    """Exact sums of products of codes, less the zero point, and codes of weights, as whole numbers in float32.

    Beyond 2^24 they are rounded to float32 once.
    """
    dtype = accumulator(layer)
    centred = codes.to(dtype) - layer.inputs.zero_point
    return layer.run(centred, layer.weights.codes.to(dtype)).float()


def _in_double(layer: FrozenLayer, x: Tensor) -> Tensor:
    """The products of inputs or weights without codes, summed in float64."""
    weights = layer.weights.codes if layer.weights.whole else layer.weights.values()
    return layer.run(x.double(), weights.double()).float()


def scaled(layer: FrozenLayer, sums: Tensor, sides: tuple[int, ...]) -> Tensor:
    """The sums of a folded layer times its multiplier, plus its bias."""
    multiplier, bias = constants(layer, tuple(sides))
    return sums * multiplier if bias is None else sums * multiplier + bias


def constants(layer: FrozenLayer, sides: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Multiplier and bias of a folded layer, for inputs with these `sides`, in shapes that broadcast against its sums.

    With an offset, the codes of inputs stand for values that lie between those of whole codes, but padding is exactly
    zero. So the bias depends on how many weights lie inside the image: (1, C, H, W) in a layer with padding.
    """
    shape = (1, -1) if layer.linear else (1, -1, 1, 1)
    multiplier = layer.multiplier.view(shape)
    bias = None if layer.bias is None else layer.bias.view(shape)
    if not layer.whole or layer.inputs.offset == 0:
        return multiplier, bias
    shift = layer.inputs.offset * weights_inside(layer, layer.weights.codes, sides) * multiplier.double()
    return multiplier, (-shift if bias is None else bias.double() - shift).float()


def weights_inside(layer: FrozenLayer, weights: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Sums of the weights that lie inside an image with these `sides`, at each place of the output, in float64.

    Without padding all do: (1, C, 1, 1), or (1, C) of a fully connected layer. Otherwise (1, C, H, W).
    """
    weights = weights.double()
    if layer.linear or not any(layer.pads):
        return weights.flatten(1).sum(dim=1).view((1, -1) if layer.linear else (1, -1, 1, 1))
    channels = weights.size(1) * layer.groups
    return layer.run(torch.ones(1, channels, *sides, dtype=torch.float64), weights)
