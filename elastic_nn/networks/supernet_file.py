"""The file of a trained float supernet, and the quantized supernet that takes its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.space import SearchSpace, space_from_dict, space_to_dict
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets


def save_supernet(path: Path, net: DynamicProxylessNASNets, **facts: Any) -> None:
    """Write a float supernet with its space and what is known of its training."""
    save_checkpoint(path, {"space": space_to_dict(net.space), "state_dict": net.state_dict(), **facts})


def load_supernet(path: Path) -> DynamicProxylessNASNets:
    """The float supernet of a file; UserError where the file is damaged or its weights do not fit its space."""
    data = load_checkpoint(path, ("space", "state_dict"))
    net = DynamicProxylessNASNets(space_from_dict(data["space"]))
    try:
        net.load_state_dict(data["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path}: the weights do not fit space {net.space.name}") from error
    return net


def load_quantized_supernet(path: Path, space: SearchSpace | None = None) -> DynamicQuantizedProxylessNASNets:
    """The quantized supernet with a file's float weights; UserError if it is of another space than asked for."""
    source = load_supernet(path)
    if space is not None and source.space != space:
        raise UserError(f"{path} is a supernet of space {source.space.name}, not of {space.name} as asked")
    net = DynamicQuantizedProxylessNASNets(source.space)
    net.load_float_weights(source.state_dict())
    return net
