"""The file of a finetuned quantized subnet: weights, ranges, space, architecture and policy together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.space import SearchSpace, space_from_dict, space_to_dict
from apq.subnet import Subnet, spec_of, subnet_from_spec
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.subnet import build_subnet
from elastic_nn.quantizers import LINEAR


def save_subnet(path: Path, space: SearchSpace, subnet: Subnet, state: dict[str, torch.Tensor], **facts: Any) -> None:
    """Write a quantized subnet with all that is needed to rebuild it, and what is known of its training."""
    save_checkpoint(path, {"space": space_to_dict(space), **spec_of(space, subnet), "state_dict": state, **facts})


def load_subnet(path: Path) -> tuple[MBConvNet, SearchSpace, Subnet]:
    """The network of a file, its space and its spec; UserError where the weights do not fit."""
    data = load_checkpoint(path, ("space", "arch", "policy", "state_dict"))
    space = space_from_dict(data["space"])
    if not (isinstance(data["arch"], dict) and isinstance(data["policy"], dict)):
        raise UserError(f"{path}: its architecture and its policy must be objects")
    subnet = subnet_from_spec(space, {**data["arch"], **data["policy"]})
    net = build_subnet(space, subnet, LINEAR)
    try:
        net.load_state_dict(data["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the weights do not fit the architecture that it names") from error
    return net, space, subnet
