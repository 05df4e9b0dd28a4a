"""The file of a trained float supernet, and the quantized supernet that takes its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apq.checkpoint import check_fit, load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.space import SearchSpace, space_from_dict, space_to_dict
from elastic_nn.networks.checkpoint_layout import CLASSIFIER, RANGES, published_state
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a supernet's file says of its training: the name of the recipe and the identity of the images, if known."""

    recipe: str | None = None
    images: dict[str, Any] | None = None


def save_supernet(path: Path, net: DynamicProxylessNASNets, recipe: str, images: dict[str, Any], **facts: Any) -> None:
    """Write a float supernet with its space, its origin and what else is known of it."""
    own = {"space": space_to_dict(net.space), "state_dict": net.state_dict(), "recipe": recipe, "images": images}
    save_checkpoint(path, {**own, **facts})


def load_supernet(path: Path) -> tuple[DynamicProxylessNASNets, Origin]:
    """The float supernet of a file and its origin; UserError where the file is damaged or does not fit.

    A file in the published layout is one of `apq-imagenet`, of as many classes as it has, and of unknown origin.
    """
    data = load_checkpoint(path)
    if "space" not in data:
        return _load_published(path, data), Origin()
    if missing := [key for key in ("state_dict", "recipe") if key not in data]:
        raise UserError(f"{path} is not a supernet: it lacks {', '.join(missing)}")
    net = DynamicProxylessNASNets(space=space_from_dict(data["space"]))
    try:
        check_fit(data["state_dict"], {key: value.shape for key, value in net.state_dict().items()})
    except UserError as error:
        raise UserError(f"{path}, space {net.space.name}: {error}") from error
    net.load_state_dict(data["state_dict"])
    return net, Origin(recipe=data["recipe"], images=data.get("images"))


def load_quantized_supernet(
    path: Path, space: SearchSpace | None = None
) -> tuple[DynamicQuantizedProxylessNASNets, Origin]:
    """As `load_supernet`, with quantizers; UserError if it is of another space than asked for."""
    source, origin = load_supernet(path)
    if space is not None and source.space != space:
        raise UserError(f"{path} is a supernet of space {source.space.name}, not of {space.name} as asked")
    net = DynamicQuantizedProxylessNASNets(space=source.space)
    net.load_float_weights(source.state_dict())
    return net, origin


def _load_published(path: Path, data: dict[str, Any]) -> DynamicProxylessNASNets:
    state = published_state(path, data)
    net = DynamicProxylessNASNets(len(state[CLASSIFIER]))
    floats = {key: value for key, value in state.items() if not key.endswith(RANGES)}
    try:
        net.load_weights_from_proxylessnas(floats)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return net
