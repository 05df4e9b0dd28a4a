"""Rounds the image to codes, so that the first convolution has whole numbers too."""

from __future__ import annotations

from dataclasses import replace

import torch

from apq.errors import UserError
from dataset.table import Scale
from elastic_nn.quantizers import Rounding
from elastic_nn.quantizers.affine import affine_of_range
from export.frozen import Codes
from export.graph import IMAGE, Graph, Node


def with_image_codes(graph: Graph, scale: Scale, bits: int) -> Graph:
    """The graph with its image rounded to unsigned codes of `bits` bits, from the lowest to the highest pixel.

    All channels have one step. UserError where something other than layers reads the image.
    """
    low, high = (torch.tensor([edge]) for edge in scale.ends)
    step, zero_point = affine_of_range(low, high, bits, signed=False)
    rounding = Rounding(step.float(), zero_point.float(), torch.ones(1), torch.zeros(1))
    codes = Codes(bits=bits, lowest=0, highest=2**bits - 1, rounding=rounding)

    def with_codes(node: Node) -> Node:
        if IMAGE not in node.inputs:
            return node
        if node.layer is None:
            raise UserError(f"operation {node.name} reads the image as it is: it cannot be rounded")
        return replace(node, layer=replace(node.layer, inputs=node.layer.inputs or codes))

    return replace(graph, nodes=tuple(map(with_codes, graph.nodes)))
