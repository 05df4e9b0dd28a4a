"""Networks by name: torchvision's classification models, MobileNetV1, EfficientNet-Lite, small ones for 32 pixels.

Functions import torchvision, because it is slow and networks of spaces do not need it.
"""

from __future__ import annotations

import difflib
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from apq.errors import UserError
from apq.model import ModelSpec
from apq.own_networks import (
    LITES,
    SMALL,
    SMALL_SIDE,
    V1_BLOCKS,
    V1_SMALL_BLOCKS,
    V1_SMALL_STEM,
    V1_STEM,
    V2_SMALL_HEAD,
    V2_SMALL_STAGES,
)
from apq.skeleton import without_weights
from dataset.table import get_dataset
from elastic_nn.modules.batch_dropout import BatchDropout
from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.networks.efficientnet_lite import EfficientNetLite
from elastic_nn.networks.subnet import build_subnet
from elastic_nn.quantizers import FLOAT

if TYPE_CHECKING:
    from torchvision.models.mobilenetv2 import MobileNetV2

AUXILIARY = ("googlenet", "inception_v3")  # they return several outputs in training


def named_model(name: str, images: str | None = None) -> ModelSpec:
    """The spec of a named network for a data set (None: glyphs for small networks, ImageNet for others).

    For ImageNet its resolution is the one that it was designed for, where that is not the data set's.
    """
    dataset = get_dataset(images or ("glyphs" if name in SMALL else "imagenet"))
    side = LITES[name].side if name in LITES and dataset.name == "imagenet" else dataset.side
    return ModelSpec(
        name=name,
        dataset=dataset.name,
        in_channels=dataset.in_channels,
        n_classes=dataset.n_classes,
        resolution=SMALL_SIDE if name in SMALL else side,
    )


def build_model(spec: ModelSpec) -> nn.Module:
    """The network with new weights. Its BatchNorm layers can be recalibrated and synchronised between processes.

    UserError for an unknown name, and where the network does not run on images of its resolution.
    """
    if spec.space is not None:
        return build_subnet(spec.space, spec.subnet, FLOAT)
    _check_runs(spec)
    return _network(spec)


def _network(spec: ModelSpec) -> nn.Module:
    net = _own_or_torchvision(spec)
    _fit_input(net, spec)
    use_elastic_norms(net)
    for module in net.modules():
        if type(module) is nn.Dropout:  # both have the same attributes
            module.__class__ = BatchDropout
    return net


def use_elastic_norms(net: nn.Module) -> None:
    """Turn every BatchNorm2d into an ElasticBatchNorm2d, in place. Both have the same attributes and tensors."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = ElasticBatchNorm2d


def mobilenet_v1(n_classes: int, stem: int = V1_STEM, blocks: tuple[tuple[int, int], ...] = V1_BLOCKS) -> nn.Sequential:
    """MobileNetV1: a first convolution of stride 2, then depthwise-separable blocks, given as (channels, stride)."""
    from torchvision.ops import Conv2dNormActivation

    layers: list[nn.Module] = [Conv2dNormActivation(3, stem, stride=2)]
    width = stem
    for channels, stride in blocks:
        depthwise = Conv2dNormActivation(width, width, stride=stride, groups=width)
        layers.append(nn.Sequential(depthwise, Conv2dNormActivation(width, channels, kernel_size=1)))
        width = channels
    net = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*layers),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(width, n_classes),
        )
    )
    return net.apply(_initialise)


def mobilenet_v1_small(n_classes: int) -> nn.Sequential:
    """MobileNetV1's layout for 32-pixel images: 15 convolutions."""
    return mobilenet_v1(n_classes, V1_SMALL_STEM, V1_SMALL_BLOCKS)


def mobilenet_v2_small(n_classes: int) -> MobileNetV2:
    """MobileNetV2's layout for 32-pixel images, with a narrow last layer: 22 convolutions."""
    from torchvision.models.mobilenetv2 import MobileNetV2
    from torchvision.ops import Conv2dNormActivation

    net = MobileNetV2(n_classes, inverted_residual_setting=[list(s) for s in V2_SMALL_STAGES], dropout=0.0)
    width = V2_SMALL_STAGES[-1][1]
    net.features[-1] = Conv2dNormActivation(width, V2_SMALL_HEAD, kernel_size=1, activation_layer=nn.ReLU6)
    net.classifier[-1] = nn.Linear(V2_SMALL_HEAD, n_classes)
    return net.apply(_initialise)


def efficientnet_lite(spec: ModelSpec) -> EfficientNetLite:
    """EfficientNet-Lite of the spec's name, padded for its resolution."""
    net = EfficientNetLite(LITES[spec.name], spec.in_channels, spec.n_classes, spec.resolution)
    return net.apply(_initialise)


OWN: dict[str, Callable[[ModelSpec], nn.Module]] = {
    "mobilenet_v1": lambda spec: mobilenet_v1(spec.n_classes),
    "mobilenet_v1_small": lambda spec: mobilenet_v1_small(spec.n_classes),
    "mobilenet_v2_small": lambda spec: mobilenet_v2_small(spec.n_classes),
    **dict.fromkeys(LITES, efficientnet_lite),
}


def check_known(name: str) -> None:
    """UserError for an unknown name. It lists the nearest known ones."""
    from torchvision import models

    known = [*OWN, *models.list_models(module=models)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5)
        nearest = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(OWN)} and those of torchvision"
        raise UserError(f"unknown model {name!r}; {nearest}")


def _own_or_torchvision(spec: ModelSpec) -> nn.Module:
    if spec.name in OWN:
        return OWN[spec.name](spec)
    check_known(spec.name)
    if spec.name in AUXILIARY:
        raise UserError(f"{spec.name} has auxiliary classifiers, which are not supported here")
    from torchvision import models

    sized = {"image_size": spec.resolution} if spec.name.startswith("vit_") else {}
    try:
        return models.get_model(spec.name, weights=None, num_classes=spec.n_classes, **sized)
    except (ValueError, RuntimeError) as error:  # for example a resolution that the patches do not divide
        raise UserError(f"{spec.name} cannot be built for images of {spec.resolution} pixels: {error}") from error


def _fit_input(net: nn.Module, spec: ModelSpec) -> None:
    """Replace the first convolution by one for the channels of the images."""
    path, conv = next((path, module) for path, module in net.named_modules() if isinstance(module, nn.Conv2d))
    if conv.in_channels == spec.in_channels:
        return
    fitted = nn.Conv2d(
        spec.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=conv.bias is not None,
    )
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, fitted.apply(_initialise))


def _initialise(module: nn.Module) -> None:
    """Draw initial weights as torchvision does for MobileNetV2."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


@functools.lru_cache(maxsize=16)
def _check_runs(spec: ModelSpec) -> None:
    """UserError unless the network runs on images of its resolution, which may be too small for it.

    It runs without numbers, which takes no memory for its weights and maps.
    """
    with without_weights():
        net = _network(spec).eval()
    try:
        with torch.inference_mode():
            net(torch.zeros(1, spec.in_channels, spec.resolution, spec.resolution, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{spec.name} does not run on images of {spec.resolution} pixels: {reason}") from error
