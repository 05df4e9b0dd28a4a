"""The file of a trained float supernet, and the quantized supernet that takes its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.space import SearchSpace, space_from_dict, space_to_dict
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets


def save_supernet(path: Path, net: DynamicProxylessNASNets, recipe: str, **facts: Any) -> None:
    """Write a float supernet with its space, the name of its training recipe and what else is known of it."""
    save_checkpoint(
        path, {"space": space_to_dict(net.space), "state_dict": net.state_dict(), "recipe": recipe, **facts}
    )


def load_supernet(path: Path) -> tuple[DynamicProxylessNASNets, str]:
    """The float supernet of a file and the name of its recipe; UserError where the file is damaged or does not fit."""
    data = load_checkpoint(path, ("space", "state_dict", "recipe"))
    net = DynamicProxylessNASNets(space_from_dict(data["space"]))
    try:
        net.load_state_dict(data["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the weights do not fit space {net.space.name}") from error
    return net, str(data["recipe"])


def load_quantized_supernet(
    path: Path, space: SearchSpace | None = None
) -> tuple[DynamicQuantizedProxylessNASNets, str]:
    """As `load_supernet`, with quantizers; UserError if it is of another space than asked for."""
    source, recipe = load_supernet(path)
    if space is not None and source.space != space:
        raise UserError(f"{path} is a supernet of space {source.space.name}, not of {space.name} as asked")
    net = DynamicQuantizedProxylessNASNets(source.space)
    net.load_float_weights(source.state_dict())
    return net, recipe
