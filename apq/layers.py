"""The ordered list of convolutions that a subnet runs. Every cost is a sum over this list."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from apq.errors import UserError
from apq.operands import BLOCK_LAYERS
from apq.space import FULL_PRECISION, SCOPES, SearchSpace
from apq.stages import Slot, make_divisible
from apq.subnet import Subnet

FIXED_BITS = 8  # bits of layers whose bits are not chosen
COUNTED_BITS = 8  # full precision counts as this many bits in BitOps (OQA, QFA)
SQUEEZE = 4  # reduction ratio of squeeze-and-excitation


@dataclass(frozen=True)
class ConvLayer:
    """One convolution with "same" padding, at batch 1. A fully connected layer is a 1x1 convolution of a 1x1 input.

    Sizes and bits may be arrays of whole numbers, which broadcast: then it stands for many layers of one place in the
    network, and its counts are arrays too.

    Attributes:
        input_size: side of the square input. For another padding it is the side at which "same" padding has as many
            outputs, so that MACs and pixels read are right.
        image_input: whether it is the network's first convolution.
        norm: whether BatchNorm follows (2 parameters a channel).
        bias: whether it has a bias (1 parameter a channel).
        shared: whether its weights are stored by an earlier layer.
        linear: whether it is a fully connected layer.
    """

    in_channels: int
    out_channels: int
    input_size: int
    kernel_size: int
    stride: int
    groups: int
    w_bits: int
    a_bits: int
    image_input: bool = False
    norm: bool = True
    bias: bool = False
    shared: bool = False
    name: str = field(default="", compare=False)
    linear: bool = field(default=False, compare=False)

    @property
    def output_size(self) -> int:
        return -(-self.input_size // self.stride)

    @property
    def weights(self) -> int:
        """Number of weights, without BatchNorm and bias."""
        return self.out_channels * self.in_channels // self.groups * self.kernel_size**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates, which papers of this field call FLOPs."""
        return self.weights * self.output_size**2

    @property
    def bitops(self) -> int:
        """MACs x weight bits x activation bits. Full precision counts as 8 bits."""
        w, a = (b - (b == FULL_PRECISION) * (FULL_PRECISION - COUNTED_BITS) for b in (self.w_bits, self.a_bits))
        return self.macs * w * a

    @property
    def weighted_flops(self) -> float:
        """BitOps / 64, which OQA calls FLOPs. Equals MACs at 8 bits and in full precision."""
        return self.bitops / COUNTED_BITS**2

    @property
    def params(self) -> int:
        """Number of trained parameters: weights, bias, scale and shift of BatchNorm."""
        return self._stored_weights + self.out_channels * (2 * self.norm + self.bias)

    @property
    def size_bytes(self) -> int:
        """Bytes of the layer in a packed file: weights at their bits, in whole bytes, and float32 numbers for channels.

        A folded BatchNorm needs two of them, a multiplier and a bias, a bias alone one.
        """
        return -(-self._stored_weights * self.w_bits // 8) + self.out_channels * 4 * (2 if self.norm else self.bias)

    @property
    def published_size_bytes(self) -> float:
        """Stored bytes as they are commonly counted: a folded BatchNorm needs no multiplier."""
        return self._stored_weights * self.w_bits / 8 + self.out_channels * 4 * (self.norm or self.bias)

    @property
    def _stored_weights(self) -> int:
        return 0 if self.shared else self.weights


def slot_layer(
    space: SearchSpace, slot: Slot, role: str, side: int, mid: int, kernel_size: int, w_bits: int, a_bits: int
) -> ConvLayer:
    """The "expand", "depthwise" or "project" layer (`role`) of an elastic block with `mid` channels inside."""
    if role == "expand":
        shape = (slot.in_channels, mid, side, 1, 1, 1)
    elif role == "depthwise":
        shape = (mid, mid, side, kernel_size, slot.stride, mid)
    else:
        shape = (mid, slot.out_channels, math.ceil(side / slot.stride), 1, 1, 1)
    return ConvLayer(*shape, w_bits, a_bits, name=f"blocks.{slot.index + 1}.{role}")


def squeeze_layers(space: SearchSpace, slot: Slot, mid: int) -> list[ConvLayer]:
    """The two fully connected layers of a block's squeeze-and-excitation, in full precision; none without it."""
    if not space.stages[slot.stage].squeeze:
        return []
    inside, b, name = squeezed_channels(mid), FULL_PRECISION, f"blocks.{slot.index + 1}.squeeze"
    return [
        ConvLayer(mid, inside, 1, 1, 1, 1, b, b, norm=False, bias=True, name=f"{name}.reduce"),
        ConvLayer(inside, mid, 1, 1, 1, 1, b, b, norm=False, bias=True, name=f"{name}.excite"),
    ]


def squeezed_channels(mid: int) -> int:
    """Channels between the two layers of squeeze-and-excitation: a quarter of `mid`, rounded to a multiple of 8."""
    return int(make_divisible(mid // SQUEEZE))


def first_layers(
    space: SearchSpace, resolution: int, scope: str = "full", shared_bits: tuple[int, ...] | None = None
) -> list[ConvLayer]:
    """The layers before the slots: first convolution and, in scope `full`, the first block.

    `shared_bits` are those of a subnet (None: the highest choices). UserError for an unknown scope.
    """
    shape = (space.in_channels, space.stem_width, resolution, 3, space.stem_stride, 1)
    stem = ConvLayer(*shape, space.end_bits, space.end_bits, image_input=True, name="first_conv")
    if _check_scope(scope) == "published":
        return [stem]
    names = ("blocks.0.depthwise", "blocks.0.project")
    return [stem, *(shared_layer(space, name, resolution, *_bits(space, name, shared_bits)) for name in names)]


def last_layers(
    space: SearchSpace, resolution: int, scope: str = "full", shared_bits: tuple[int, ...] | None = None
) -> list[ConvLayer]:
    """The layers after the slots: 1x1 convolutions before and after pooling and, in scope `full`, the classifier.

    `shared_bits` are those of a subnet (None: the highest choices). UserError for an unknown scope.
    """
    names, ends = (
        ["feature_mix_layer", *([] if space.pooled_width is None else ["pooled_mix_layer"])],
        space.bits_of_classifier,
    )
    layers = [shared_layer(space, name, resolution, *_bits(space, name, shared_bits)) for name in names]
    width = layers[-1].out_channels
    if _check_scope(scope) == "published":
        return layers
    return [
        *layers,
        ConvLayer(
            *(width, space.n_classes, 1, 1, 1, 1, ends, ends), norm=False, bias=True, name="classifier", linear=True
        ),
    ]


def shared_layer(space: SearchSpace, name: str, resolution: int, w_bits: int, a_bits: int) -> ConvLayer:
    """One of `SHARED_LAYERS`, which all subnets of the space have, at these bits."""
    stem, head = space.stem_width, space.head_width
    if name.startswith("blocks.0"):
        side = math.ceil(resolution / space.stem_stride)
        shape = (
            (stem, stem, side, 3, 1, stem) if "depthwise" in name else (stem, space.first_block_width, side, 1, 1, 1)
        )
    elif name == "feature_mix_layer":
        shape = (space.stages[-1].width, head, space.input_sides(resolution)[-1], 1, 1, 1)
    else:
        shape = (head, space.pooled_width, 1, 1, 1, 1)
    return ConvLayer(*shape, w_bits, a_bits, norm=name != "pooled_mix_layer", name=name)


def shared_choices(space: SearchSpace, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choices of weight bits and of activation bits of one of `SHARED_LAYERS`: a single one where none is searched."""
    chosen = {shared.operand: shared.choices for shared in space.shared_operands if shared.layer == name}
    return tuple(chosen.get(operand, (space.fixed_bits,)) for operand in "wa")


def _bits(space: SearchSpace, name: str, shared_bits: tuple[int, ...] | None) -> tuple[int, int]:
    if shared_bits is None:
        shared_bits = tuple(shared.choices[-1] for shared in space.shared_operands)
    return space.bits_of_shared(name, shared_bits)


def layers_of(space: SearchSpace, subnet: Subnet, scope: str = "full") -> list[ConvLayer]:
    """Every convolution that the subnet runs, in network order, with its bits.

    Scope `published` leaves out the first inverted-residual block and the classifier, as the published totals do.
    """
    sides = space.input_sides(subnet.resolution)
    layers = first_layers(space, subnet.resolution, scope, subnet.shared_bits)
    for slot in subnet.running_slots(space):
        i, mid = slot.index, subnet.mid_channels(slot)
        for role in BLOCK_LAYERS:
            if role == "project":
                layers += squeeze_layers(space, slot, mid)
            w, a = (subnet.bits[space.kind_of(role, operand)][i] for operand in "wa")
            layers.append(slot_layer(space, slot, role, sides[i], mid, subnet.ks[i], w, a))
    return layers + last_layers(space, subnet.resolution, scope, subnet.shared_bits)


def searchable_layers(space: SearchSpace) -> list[ConvLayer]:
    """The layers of a cost table, each once: all legal layers of the slots, in slot order, then those of
    squeeze-and-excitation, then the shared layers whose bits are searched."""
    layers: dict[ConvLayer, None] = {}
    for resolution, slot, role in itertools.product(space.resolutions, space.slots, BLOCK_LAYERS):
        side = space.input_sides(resolution)[slot.index]
        w_kind, a_kind = (space.operands[space.kind_of(role, operand)] for operand in "wa")
        kernels = space.kernel_sizes if role == "depthwise" else (1,)
        for mid, kernel, w, a in itertools.product(slot.mid_channels, kernels, w_kind.choices, a_kind.choices):
            chosen = {(kernel, w_kind.name, w), (kernel, a_kind.name, a)}
            if not any((rule.kernel_size, rule.operand, rule.bits) in chosen for rule in space.forbidden):
                layers[slot_layer(space, slot, role, side, mid, kernel, w, a)] = None
    squeezes = (squeeze_layers(space, slot, mid) for slot in space.slots for mid in slot.mid_channels)
    searched = (
        shared_layer(space, name, resolution, w, a)
        for resolution, name in itertools.product(
            space.resolutions, dict.fromkeys(f.layer for f in space.shared_operands)
        )
        for w, a in itertools.product(*shared_choices(space, name))
    )
    return list(layers | dict.fromkeys(itertools.chain(*squeezes, searched)))


def _check_scope(scope: str) -> str:
    if scope not in SCOPES:
        raise UserError(f"unknown cost scope {scope!r}; known: {', '.join(SCOPES)}")
    return scope
