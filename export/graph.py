"""A network as a graph: frozen layers, norms and operations by name, in running order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from export.frozen import FrozenLayer

IMAGE = "image"  # the name of the input


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """BatchNorm of C channels with fixed statistics, (C,) float32 each."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def multiplier_and_bias(self) -> tuple[Tensor, Tensor]:
        """The same as a product and a sum, (C,) float64 each."""
        mean, variance, weight, bias = (part.double() for part in (self.mean, self.variance, self.weight, self.bias))
        multiplier = weight / (variance + self.eps).sqrt()
        return multiplier, bias - mean * multiplier


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """One value of the graph: what computes it, and from which values.

    Attributes:
        op: "layer", "norm", or the name of an operation (see `operations`).
        shape: that of the value for one image, without the batch.
        settings: what the operation needs, such as the window of a pooling.
        layer, norm: of nodes with these operations.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer: FrozenLayer | None = None
    norm: Norm | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """Nodes in running order; the last one is the output. `image_shape` is (C, H, W)."""

    image_shape: tuple[int, ...]
    nodes: tuple[Node, ...]

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    @property
    def layers(self) -> dict[str, FrozenLayer]:
        """The layers by name, in running order."""
        return {node.name: node.layer for node in self.nodes if node.layer is not None}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a value for one image."""
        return self.image_shape if name == IMAGE else next(node.shape for node in self.nodes if node.name == name)

    def users(self) -> dict[str, list[Node]]:
        """The nodes that read each value."""
        found: dict[str, list[Node]] = {name: [] for name in (IMAGE, *(node.name for node in self.nodes))}
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        return found


def folded(graph: Graph) -> Graph:
    """The graph with norms folded into layers: a multiplier and a bias for each channel, as float32.

    The sum of codes of a layer is multiplied by the multiplier, which has the steps of inputs and weights in it, then
    the bias is added. A norm that does not follow a layer alone becomes the operation "scale". Norms behind a layer
    that others read too do as well.
    """
    users, nodes, new_name = graph.users(), [], {}
    of_layer = {
        node.name: users[node.name][0]
        for node in graph.nodes
        if node.layer is not None and [user.op for user in users[node.name]] == ["norm"]
    }
    folded_norms = {norm.name: name for name, norm in of_layer.items()}
    for node in graph.nodes:
        if node.name in folded_norms:
            new_name[node.name] = folded_norms[node.name]
            continue
        node = replace(node, inputs=tuple(new_name.get(name, name) for name in node.inputs))
        if node.layer is not None:
            norm = of_layer[node.name].norm if node.name in of_layer else None
            node = replace(node, layer=fold(node.layer, norm))
        elif node.norm is not None:
            multiplier, bias = (part.float() for part in node.norm.multiplier_and_bias())
            node = replace(node, op="scale", norm=None, settings={"multiplier": multiplier, "bias": bias})
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


@torch.no_grad()
def fold(layer: FrozenLayer, norm: Norm | None) -> FrozenLayer:
    """A layer with the norm that follows it as multiplier and bias, in float32.

    Without a norm the multiplier is one number for all channels, and the bias the layer's own or None.
    """
    multiplier, bias = torch.ones((), dtype=torch.float64), None if layer.bias is None else layer.bias.double()
    if norm is not None:
        multiplier, shift = norm.multiplier_and_bias()
        bias = shift if bias is None else shift + bias * multiplier
    if layer.weights.step is not None:
        multiplier = multiplier * layer.weights.step.double().squeeze()
    if layer.whole:
        step, _, gain, _ = (part.double().squeeze() for part in layer.inputs.rounding)
        multiplier = multiplier * step / gain
    return replace(layer, multiplier=multiplier.float(), bias=None if bias is None else bias.float())
