"""The one network class: a supernet and a stand-alone subnet are the same assembly of different shapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from apq.space import SearchSpace
from apq.subnet import Subnet
from elastic_nn.modules.elastic_conv import ElasticConv2d
from elastic_nn.modules.mbconv import BlockShape, ConvNormAct, ElasticMBConv
from elastic_nn.modules.quant_layers import QuantLinear
from elastic_nn.quantizers import FLOAT, QuantScheme


@dataclass(frozen=True, kw_only=True)
class NetShape:
    """Sizes of a whole network. `blocks[0]` is the fixed block without expansion."""

    in_channels: int
    stem_width: int
    stem_stride: int
    blocks: tuple[BlockShape, ...]
    head_width: int
    n_classes: int
    mix_activation_bits: int


def supernet_shape(space: SearchSpace) -> NetShape:
    """The largest network of a space, with every kernel choice."""
    slots = (
        BlockShape(
            in_channels=slot.in_channels,
            mid_channels=slot.mid_channels[-1],
            out_channels=slot.out_channels,
            kernel_sizes=space.kernel_sizes,
            stride=slot.stride,
        )
        for slot in space.slots
    )
    return _shape(space, tuple(slots))


def subnet_shape(space: SearchSpace, subnet: Subnet) -> NetShape:
    """The network of one subnet: only the blocks that run, each with its one kernel and width."""
    slots = (
        BlockShape(
            in_channels=slot.in_channels,
            mid_channels=round(subnet.e[slot.index] * slot.in_channels),
            out_channels=slot.out_channels,
            kernel_sizes=(subnet.ks[slot.index],),
            stride=slot.stride,
        )
        for slot in space.slots
        if slot.position < subnet.d[slot.stage]
    )
    return _shape(space, tuple(slots))


def _shape(space: SearchSpace, slots: tuple[BlockShape, ...]) -> NetShape:
    first = BlockShape(
        in_channels=space.stem_width,
        mid_channels=space.stem_width,
        out_channels=space.first_block_width,
        kernel_sizes=(3,),
        stride=1,
        expand=False,
    )
    return NetShape(
        in_channels=space.in_channels,
        stem_width=space.stem_width,
        stem_stride=space.stem_stride,
        blocks=(first, *slots),
        head_width=space.head_width,
        n_classes=space.n_classes,
        mix_activation_bits=space.mix_activation_bits,
    )


class MBConvNet(nn.Module):
    """First convolution, inverted-residual blocks, last 1x1, pooling, classifier.

    The quantizers come with the scheme. What is not searched runs at 8 bits (the last 1x1's input at the space's
    `mix_activation_bits`); the image enters unquantized.
    `active_blocks` are the indices of the blocks that run.
    """

    def __init__(self, shape: NetShape, scheme: QuantScheme) -> None:
        super().__init__()
        first = ElasticConv2d(
            shape.in_channels, shape.stem_width, (3,), shape.stem_stride, scheme, quantize_input=False
        )
        self.first_conv = ConvNormAct(first, act=True)
        self.blocks = nn.ModuleList(ElasticMBConv(block, scheme) for block in shape.blocks)
        mix = ElasticConv2d(shape.blocks[-1].out_channels, shape.head_width, (1,), 1, scheme, signed_input=True)
        if scheme is not FLOAT:
            mix.act_quant.bits = shape.mix_activation_bits
        self.feature_mix_layer = ConvNormAct(mix, act=True)
        self.dropout = nn.Dropout(0.0)
        self.classifier = QuantLinear(shape.head_width, shape.n_classes, scheme)
        self.scheme = scheme
        self.active_blocks: tuple[int, ...] = tuple(range(len(shape.blocks)))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, classes)
        x = self.first_conv(x)
        for i in self.active_blocks:
            x = self.blocks[i](x)
        x = self.feature_mix_layer(x).mean((2, 3))
        return self.classifier(self.dropout(x))

    def set_block_bits(self, index: int, space: SearchSpace, bits: tuple[int, ...]) -> None:
        """Give a block its bits, one an operand kind of the space. A float network has none to give."""
        if self.scheme is FLOAT:
            return
        for role, unit in self.blocks[index].layers().items():
            unit.conv.weight_quant.bits = bits[space.kind_of(role, "w")]
            unit.conv.act_quant.bits = bits[space.kind_of(role, "a")]
