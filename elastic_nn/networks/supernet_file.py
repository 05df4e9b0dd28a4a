"""The file of a trained float supernet, and the quantized supernet that takes its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.space import SearchSpace, space_from_dict, space_to_dict
from elastic_nn.networks.checkpoint_layout import CLASSIFIER, RANGES, published_state
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets


def save_supernet(path: Path, net: DynamicProxylessNASNets, recipe: str, **facts: Any) -> None:
    """Write a float supernet with its space, the name of its training recipe and what else is known of it."""
    save_checkpoint(
        path, {"space": space_to_dict(net.space), "state_dict": net.state_dict(), "recipe": recipe, **facts}
    )


def load_supernet(path: Path) -> tuple[DynamicProxylessNASNets, str | None]:
    """The float supernet of a file and the name of its recipe; UserError where the file is damaged or does not fit.

    A file in the published layout is one of `apq-imagenet`, of as many classes as it has, and names no recipe.
    """
    data = load_checkpoint(path)
    if "space" not in data:
        return _load_published(path, data), None
    if missing := [key for key in ("state_dict", "recipe") if key not in data]:
        raise UserError(f"{path} is not a supernet: it lacks {', '.join(missing)}")
    net = DynamicProxylessNASNets(space=space_from_dict(data["space"]))
    try:
        net.load_state_dict(data["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the weights do not fit space {net.space.name}") from error
    return net, str(data["recipe"])


def load_quantized_supernet(
    path: Path, space: SearchSpace | None = None
) -> tuple[DynamicQuantizedProxylessNASNets, str | None]:
    """As `load_supernet`, with quantizers; UserError if it is of another space than asked for."""
    source, recipe = load_supernet(path)
    if space is not None and source.space != space:
        raise UserError(f"{path} is a supernet of space {source.space.name}, not of {space.name} as asked")
    net = DynamicQuantizedProxylessNASNets(space=source.space)
    net.load_float_weights(source.state_dict())
    return net, recipe


def _load_published(path: Path, data: dict[str, Any]) -> DynamicProxylessNASNets:
    state = published_state(path, data)
    net = DynamicProxylessNASNets(len(state[CLASSIFIER]))
    floats = {key: value for key, value in state.items() if not key.endswith(RANGES)}
    try:
        net.load_weights_from_proxylessnas(floats)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return net
