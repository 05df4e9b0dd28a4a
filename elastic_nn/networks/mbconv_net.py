"""The network of a search space. Supernets and stand-alone subnets are built by this class, with other shapes."""

from __future__ import annotations

from torch import Tensor, nn

from apq.bit_widths import all_bits
from apq.space import FULL_PRECISION, SearchSpace, Slot
from apq.subnet import Subnet
from elastic_nn.modules.batch_dropout import BatchDropout
from elastic_nn.modules.elastic_conv import ElasticConv2d
from elastic_nn.modules.mbconv import ACTIVATIONS, BlockShape, ConvNormAct, ElasticMBConv
from elastic_nn.modules.quant_layers import QuantLinear, name_quantizers, quantized_layers, quantizers
from elastic_nn.quantizers import FLOAT, QuantScheme


def supernet_blocks(space: SearchSpace) -> list[BlockShape]:
    """The blocks of the largest subnet of a space, with all choices of kernel sizes."""
    slots = (_slot_block(space, slot, slot.mid_channels[-1], space.kernel_sizes) for slot in space.slots)
    return [_first_block(space), *slots]


def subnet_blocks(space: SearchSpace, subnet: Subnet) -> list[BlockShape]:
    """The blocks that a subnet runs, each with its kernel size and mid channels."""
    slots = (
        _slot_block(space, slot, subnet.mid_channels(slot), (subnet.ks[slot.index],))
        for slot in subnet.running_slots(space)
    )
    return [_first_block(space), *slots]


def _slot_block(space: SearchSpace, slot: Slot, mid_channels: int, kernel_sizes: tuple[int, ...]) -> BlockShape:
    return BlockShape(
        in_channels=slot.in_channels,
        mid_channels=mid_channels,
        out_channels=slot.out_channels,
        kernel_sizes=kernel_sizes,
        stride=slot.stride,
        squeeze=space.stages[slot.stage].squeeze,
        activation=space.stages[slot.stage].activation,
        shortcut=slot.stride == 1 and slot.in_channels == slot.out_channels,
        norm_eps=space.norm_eps,
    )


def _first_block(space: SearchSpace) -> BlockShape:
    return BlockShape(
        in_channels=space.stem_width,
        mid_channels=space.stem_width,
        out_channels=space.first_block_width,
        kernel_sizes=(3,),
        stride=1,
        expand=False,
        activation=space.first_block_activation,
        shortcut=space.first_shortcut,
        norm_eps=space.norm_eps,
    )


class MBConvNet(nn.Module):
    """First convolution, inverted-residual blocks, last 1x1, pooling, in some spaces another 1x1, classifier.

    The scheme makes the quantizers. Shared operands that are not searched have the `fixed_bits` of the space (the input
    of the last 1x1: `mix_activation_bits`), the ends its `end_bits` and `classifier_bits`. The image is not quantized.
    `active_blocks` are the indices of the blocks that run.
    """

    def __init__(self, space: SearchSpace, blocks: list[BlockShape], scheme: QuantScheme) -> None:
        super().__init__()
        act, width, eps = space.end_activation, space.head_width, space.norm_eps
        of_stem, of_classifier = (
            FLOAT if bits == FULL_PRECISION else scheme for bits in (space.end_bits, space.bits_of_classifier)
        )
        stem = (space.in_channels, space.stem_width, (3,), space.stem_stride)
        self.first_conv = ConvNormAct(ElasticConv2d(*stem, of_stem, quantize_input=False), act, eps)
        self.blocks = nn.ModuleList(ElasticMBConv(block, scheme) for block in blocks)
        mix = ElasticConv2d(blocks[-1].out_channels, width, (1,), 1, scheme, signed_input=True)
        self.feature_mix_layer = ConvNormAct(mix, act, eps)
        if space.pooled_width is None:
            self.pooled_mix_layer = self.pooled_act = nn.Identity()
        else:
            self.pooled_mix_layer = QuantLinear(width, space.pooled_width, scheme, bias=False)
            self.pooled_act, width = ACTIVATIONS[act](inplace=True), space.pooled_width
        self.dropout = BatchDropout(0.0)
        self.classifier = QuantLinear(width, space.n_classes, of_classifier)
        self.scheme = scheme
        self.active_blocks: tuple[int, ...] = tuple(range(len(blocks)))
        self.set_shared_bits(space, tuple(shared.choices[-1] for shared in space.shared_operands))
        for quantizer in quantizers(self):
            quantizer.restrict(all_bits(space))
        name_quantizers(self)
        self._with_statistics = tuple(quantizer for quantizer in quantizers(self) if quantizer.needs_statistics)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, classes)
        x = self.first_conv(x)
        for i in self.active_blocks:
            x = self.blocks[i](x)
        x = self.feature_mix_layer(x).mean((2, 3))
        x = self.pooled_act(self.pooled_mix_layer(x))
        return self.classifier(self.dropout(x))

    def set_shared_bits(self, space: SearchSpace, shared_bits: tuple[int, ...]) -> None:
        """Set the bits of the shared layers and the ends: those of the space, or those that a subnet chose."""
        for part in (self.blocks[0], self.feature_mix_layer, self.pooled_mix_layer):
            for layer in quantized_layers(part).values():
                layer.set_bits(space.fixed_bits, space.fixed_bits)
        self.feature_mix_layer.conv.set_bits(space.fixed_bits, space.mix_activation_bits)
        self.first_conv.conv.set_bits(space.end_bits, space.end_bits)
        self.classifier.set_bits(space.bits_of_classifier, space.bits_of_classifier)
        for shared, bits in zip(space.shared_operands, shared_bits, strict=True):
            unit = self.get_submodule(shared.layer)
            layer = unit.conv if isinstance(unit, ConvNormAct) else unit
            {"w": layer.weight_quant, "a": layer.act_quant}[shared.operand].bits = bits

    def forget_ranges(self) -> None:
        """Drop the statistics of the active subnet before another one runs. Learned ranges and steps stay."""
        for quantizer in self._with_statistics:
            quantizer.invalidate()

    def set_block_bits(self, index: int, space: SearchSpace, bits: tuple[int, ...]) -> None:
        """Set the bits of a block, one number for each operand kind of the space. A float network ignores them."""
        for role, unit in self.blocks[index].layers().items():
            unit.conv.set_bits(bits[space.kind_of(role, "w")], bits[space.kind_of(role, "a")])
