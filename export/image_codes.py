"""Rounds the image to codes, so that the first convolution has whole numbers too."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from apq.errors import UserError
from dataset.table import Scale
from elastic_nn.quantizers import Rounding
from elastic_nn.quantizers.affine import affine_of_range
from export.frozen import Codes
from export.graph import IMAGE, Graph, Node


def image_codes(scale: Scale, bits: int) -> Codes:
    """Unsigned codes of `bits` bits for images, from the lowest to the highest pixel. All channels have one step."""
    low, high = (torch.tensor([edge]) for edge in scale.ends)
    step, zero_point = affine_of_range(low, high, bits, signed=False)
    rounding = Rounding(step.float(), zero_point.float(), torch.ones(1), torch.zeros(1))
    return Codes(bits=bits, lowest=0, highest=2**bits - 1, rounding=rounding)


class RoundedImages(nn.Module):
    """A network that sees its images at the values of codes."""

    def __init__(self, net: nn.Module, codes: Codes) -> None:
        super().__init__()
        self.net, self.codes = net, codes

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.codes.values(self.codes.codes(images)))


def with_image_codes(graph: Graph, codes: Codes) -> Graph:
    """The graph with its image rounded to codes. UserError where something other than layers reads the image."""

    def with_codes(node: Node) -> Node:
        if IMAGE not in node.inputs:
            return node
        if node.layer is None:
            raise UserError(f"operation {node.name} reads the image as it is: it cannot be rounded")
        return replace(node, layer=replace(node.layer, inputs=node.layer.inputs or codes))

    return replace(graph, nodes=tuple(map(with_codes, graph.nodes)))
