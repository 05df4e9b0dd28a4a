"""Makes paddings that are operations of their own, as networks from TensorFlow have them, a part of the layers.

Runtimes compute a convolution in whole numbers with its padding, but a padding of floats before it in floats.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from export.frozen import FrozenLayer
from export.graph import Graph


def without_pads(graph: Graph) -> Graph:
    """The graph without paddings that are only read by layers whose own padding of zeros does the same."""
    users, pads, nodes = graph.users(), {}, []
    for node in graph.nodes:
        readers = users[node.name]
        if node.op == "pad" and readers and all(user.layer is not None and _takes(user.layer) for user in readers):
            pads[node.name] = node
            continue
        if node.layer is not None and node.inputs[0] in pads:
            pad = pads[node.inputs[0]]
            node = replace(node, inputs=pad.inputs, layer=_padded(node.layer, pad.settings["pads"]))
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _takes(layer: FrozenLayer) -> bool:
    """Whether zeros before the rounding of the inputs are zeros after it, in a convolution."""
    if layer.linear:
        return False
    zero = torch.zeros(1)
    return layer.inputs is None or layer.inputs.values(layer.inputs.codes(zero)).item() == 0


def _padded(layer: FrozenLayer, pads: tuple[int, int, int, int]) -> FrozenLayer:
    top, left, bottom, right = (own + more for own, more in zip(layer.pads, pads, strict=True))
    start, end = (top, left), (bottom, right)
    return replace(layer, padding=start, padding_end=None if end == start else end)
