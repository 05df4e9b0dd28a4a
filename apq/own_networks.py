"""The toolkit's own networks by name, as plain data, and the layers that they run.

`elastic_nn.networks.named_models` builds them from the same tables. Names of layers are those of the built networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from apq.layers import ConvLayer
from apq.stages import make_divisible

# Output channels and stride of each depthwise-separable block (Howard et al., arXiv 1704.04861, table 1). The last
# stride in that table is a misprint: the map stays at 7 pixels.
V1_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)
V1_STEM = 32
V1_SMALL_BLOCKS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1))  # maps of 16, 8, 4, 2 pixels
# Expansion, channels, blocks, stride of each stage, as in torchvision's MobileNetV2. Narrow bottlenecks are bound by
# memory: with larger expansions fewer bits would hardly make the network faster.
V2_SMALL_STAGES = ((1, 8, 1, 1), (2, 16, 3, 2), (4, 16, 2, 1), (2, 48, 1, 2))  # maps of 16, 8, 8, 4 pixels
V1_SMALL_STEM, V2_STEM, V2_SMALL_HEAD = 8, 32, 96
SMALL, SMALL_SIDE = ("mobilenet_v1_small", "mobilenet_v2_small"), 32  # torchvision's small networks are for 224 pixels


@dataclass(frozen=True, kw_only=True)
class LiteScale:
    """How an EfficientNet-Lite is scaled: factors of widths and of blocks a stage; resolution; dropout."""

    width: float
    depth: float
    side: int
    dropout: float


# EfficientNet-Lite, from efficientnet_lite_builder.py of https://github.com/tensorflow/tpu: no squeeze-and-excitation,
# ReLU6 everywhere, and neither the ends' widths nor the blocks of the first and last stage are scaled.
LITES = {
    "efficientnet_lite0": LiteScale(width=1.0, depth=1.0, side=224, dropout=0.2),
    "efficientnet_lite1": LiteScale(width=1.0, depth=1.1, side=240, dropout=0.2),
    "efficientnet_lite2": LiteScale(width=1.1, depth=1.2, side=260, dropout=0.3),
}
# Expansion, channels, blocks, stride, kernel size of each stage.
LITE_STAGES = (
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
    *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)
LITE_STEM, LITE_HEAD = 32, 1280
OWN_NETWORKS = ("mobilenet_v1", *SMALL, *LITES)


@dataclass(frozen=True, kw_only=True)
class LiteBlock:
    """A block of an EfficientNet-Lite: its channels, without expansion if `mid` is `channels`; stride, kernel size."""

    channels: int
    mid: int
    out: int
    stride: int
    kernel: int


def lite_blocks(scale: LiteScale) -> Iterator[LiteBlock]:
    """The blocks in running order."""
    channels = LITE_STEM
    for i, (expansion, width, blocks, first_stride, kernel) in enumerate(LITE_STAGES):
        out = int(make_divisible(width * scale.width))
        ends = i in (0, len(LITE_STAGES) - 1)
        for j in range(blocks if ends else math.ceil(blocks * scale.depth)):
            stride = 1 if j else first_stride
            yield LiteBlock(channels=channels, mid=expansion * channels, out=out, stride=stride, kernel=kernel)
            channels = out


@dataclass
class _Layers:
    """Layers so far, with the channels and the side of their output."""

    bits: tuple[int, int]
    channels: int
    side: int
    rows: list[ConvLayer]

    def add(self, name: str, out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1) -> None:
        """Append a convolution followed by BatchNorm."""
        shape = (self.channels, out, self.side, kernel, stride, groups, *self.bits)
        self.rows.append(ConvLayer(*shape, image_input=not self.rows, name=name))
        self.channels, self.side = out, self.rows[-1].output_size

    def classify(self, name: str, n_classes: int) -> list[ConvLayer]:
        """Append the classifier after pooling, and return all layers."""
        shape = (self.channels, n_classes, 1, 1, 1, 1, *self.bits)
        return [*self.rows, ConvLayer(*shape, norm=False, bias=True, name=name, linear=True)]


def layers_of_own(name: str, bits: tuple[int, int], side: int, in_channels: int, n_classes: int) -> list[ConvLayer]:
    """The layers of one of OWN_NETWORKS at these bits of weights and activations, in running order."""
    layers = _Layers(bits=bits, channels=in_channels, side=side, rows=[])
    if name == "mobilenet_v2_small":
        return _v2_layers(layers, n_classes)
    if name in LITES:
        return _lite_layers(layers, LITES[name], n_classes)
    stem, blocks = (V1_STEM, V1_BLOCKS) if name == "mobilenet_v1" else (V1_SMALL_STEM, V1_SMALL_BLOCKS)
    layers.add("features.0.0", stem, 3, 2)
    for i, (channels, stride) in enumerate(blocks, start=1):
        layers.add(f"features.{i}.0.0", layers.channels, 3, stride, groups=layers.channels)
        layers.add(f"features.{i}.1.0", channels)
    return layers.classify("classifier", n_classes)


def _v2_layers(layers: _Layers, n_classes: int) -> list[ConvLayer]:
    layers.add("features.0.0", V2_STEM, 3, 2)
    block = 0
    for expansion, channels, repeats, first_stride in V2_SMALL_STAGES:
        for stride in (first_stride, *[1] * (repeats - 1)):
            block += 1
            mid, depthwise = expansion * layers.channels, int(expansion > 1)  # without expansion there is no such layer
            if expansion > 1:
                layers.add(f"features.{block}.conv.0.0", mid)
            layers.add(f"features.{block}.conv.{depthwise}.0", mid, 3, stride, groups=mid)
            layers.add(f"features.{block}.conv.{depthwise + 1}", channels)
    layers.add(f"features.{block + 1}.0", V2_SMALL_HEAD)
    return layers.classify("classifier.1", n_classes)


def _lite_layers(layers: _Layers, scale: LiteScale, n_classes: int) -> list[ConvLayer]:
    layers.add("features.0.conv", LITE_STEM, 3, 2)
    n_blocks = 0
    for n_blocks, block in enumerate(lite_blocks(scale), start=1):
        if block.mid > block.channels:
            layers.add(f"features.{n_blocks}.expand.conv", block.mid)
        layers.add(f"features.{n_blocks}.depthwise.conv", block.mid, block.kernel, block.stride, groups=block.mid)
        layers.add(f"features.{n_blocks}.project.conv", block.out)
    layers.add(f"features.{n_blocks + 1}.conv", LITE_HEAD)
    return layers.classify("classifier", n_classes)
