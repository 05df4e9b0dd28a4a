"""The file of a trained supernet; and the quantized supernet made from a float one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.files import Record
from apq.skeleton import built_for, without_weights
from apq.space import SearchSpace, space_from_dict, space_to_dict
from elastic_nn.modules.quant_layers import quantizer_keys
from elastic_nn.networks.checkpoint_layout import from_published
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.published_supernet import PublishedSupernet, published_supernet
from elastic_nn.quantizers import FLOAT, LINEAR, QuantScheme, scheme_named


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a supernet was trained: the name of its recipe, the identity of its images and their folder, if known."""

    recipe: str | None = None
    images: Record | None = None
    data: str | None = None


def save_supernet(
    path: Path, net: DynamicProxylessNASNets, recipe: str | None, images: Record | None, **facts: Any
) -> None:
    """Write a supernet with its space, the name of its scheme, its origin (None: unknown) and other facts."""
    own = {"space": space_to_dict(net.space), "scheme": net.scheme.name, "state_dict": net.state_dict()}
    save_checkpoint(path, {**own, "recipe": recipe, "images": images, **facts})


def build_supernet(space: SearchSpace, scheme: QuantScheme) -> DynamicProxylessNASNets:
    """A new supernet of a space, with the quantizers of a scheme."""
    if not scheme.quantizes:
        return DynamicProxylessNASNets(space=space)
    return DynamicQuantizedProxylessNASNets(space=space, scheme=scheme)


def load_supernet(path: Path, space: SearchSpace | None = None) -> tuple[DynamicProxylessNASNets, Origin]:
    """Load the supernet of a file, float or with the quantizers that it was trained with, and its origin.

    A file without a scheme has a float supernet. A file in a published layout does not name its space: it is `space`,
    or else the one that `published_supernet` finds. Its origin is unknown. UserError where the file is damaged or does
    not fit.
    """
    if not path.exists():
        raise UserError(f"no supernet at {path}: train one with train.py --space SPACE --out {path.parent}")
    data = load_checkpoint(path)
    if "space" not in data:
        return _load_published(path, published_supernet(path, data, space)), Origin()
    if missing := [key for key in ("state_dict", "recipe") if key not in data]:
        raise UserError(f"{path} is not a supernet: it lacks {', '.join(missing)}")
    space = space_from_dict(data["space"])
    try:
        scheme = scheme_named(data.get("scheme", FLOAT.name))
        net = built_for(partial(build_supernet, space, scheme), data["state_dict"])
    except UserError as error:
        raise UserError(f"{path}, space {space.name}: {error}") from error
    return net, Origin(recipe=data["recipe"], images=data.get("images"), data=data.get("data"))


def load_quantized_supernet(
    path: Path, space: SearchSpace | None = None
) -> tuple[DynamicQuantizedProxylessNASNets, Origin]:
    """Like `load_supernet`, but a float supernet gets linear quantizers.

    UserError if its space is not `space`.
    """
    source, origin = load_supernet(path, space)
    if space is not None and source.space != space:
        raise UserError(f"{path} is a supernet of space {source.space.name}, not of {space.name}")
    return with_quantizers(source, LINEAR), origin


def with_quantizers(net: DynamicProxylessNASNets, scheme: QuantScheme) -> DynamicQuantizedProxylessNASNets:
    """A float supernet, or one to which quantizers were added, with those of `scheme`. They have no ranges yet.

    One that was trained quantized stays as it is.
    """
    if isinstance(net, DynamicQuantizedProxylessNASNets) and (net.scheme.trains_supernets or net.scheme == scheme):
        return net
    quantized, ranges = DynamicQuantizedProxylessNASNets(space=net.space, scheme=scheme), quantizer_keys(net)
    quantized.load_float_weights({key: value for key, value in net.state_dict().items() if key not in ranges})
    return quantized.to(next(net.parameters()).device)


def _load_published(path: Path, found: PublishedSupernet) -> DynamicProxylessNASNets:
    try:
        with without_weights():
            from_published(found.state, build_supernet(found.space, found.scheme), found.layout)
        net = build_supernet(found.space, found.scheme)
        net.load_state_dict(from_published(found.state, net, found.layout), strict=False)
    except UserError as error:
        raise UserError(f"{path}, space {found.space.name}: {error}") from error
    return net
