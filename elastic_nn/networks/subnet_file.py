"""The file of a finetuned quantized subnet: weights, ranges, space, architecture and policy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.model import ModelSpec, subnet_model
from apq.presets import published_space
from apq.search_result import read_result
from apq.skeleton import built_for, without_weights
from apq.space import SearchSpace, space_from_dict, space_to_dict
from apq.subnet import Subnet, spec_of, subnet_from_spec
from elastic_nn.networks.checkpoint_layout import from_published, published_state
from elastic_nn.networks.layout import Layout
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.subnet import build_subnet
from elastic_nn.quantizers import FLOAT, LINEAR, QuantScheme, scheme_named


class FinetunedSubnet(NamedTuple):
    """A network with its space and subnet. `images` identifies its training images, if they are known."""

    net: MBConvNet
    space: SearchSpace
    subnet: Subnet
    images: Record | None


def save_subnet(
    path: Path,
    space: SearchSpace,
    subnet: Subnet,
    state: dict[str, torch.Tensor],
    *,
    scheme: QuantScheme = LINEAR,
    **facts: Any,
) -> None:
    """Write a quantized subnet with all that rebuilding it needs, and facts about its training."""
    described = {"space": space_to_dict(space), "scheme": scheme.name, **spec_of(space, subnet)}
    save_checkpoint(path, {**described, "state_dict": state, **facts})


def load_subnet(path: Path) -> tuple[MBConvNet, SearchSpace, Subnet]:
    """Load the network of a file, its space and its subnet. UserError where the weights do not fit."""
    return _rebuild(path, load_checkpoint(path))


def load_finetuned(experiment: Experiment) -> FinetunedSubnet:
    """Load the finetuned network of an experiment. UserError unless it is the network of the `arch` file.

    A checkpoint in the published layout does not record its architecture, which is then that of the `arch` file, in
    `apq-imagenet` with as many classes as the classifier has outputs.
    """
    path = experiment.best_checkpoint
    data = load_checkpoint(path)
    if "arch" not in data:
        return FinetunedSubnet(*_from_published(experiment, *published_state(path, data)), None)
    net, space, subnet = _rebuild(path, data)
    if experiment.config.exists() and read_result(experiment).found_subnet.space != space:
        raise UserError(f"{experiment.config} is of another space than {path}; finetune it again")
    if experiment.load_subnet(space) != subnet:
        raise UserError(f"{experiment.arch} is not the network of {path}; finetune it again")
    return FinetunedSubnet(net, space, subnet, data.get("images"))


def load_float_subnet(experiment: Experiment) -> tuple[MBConvNet, ModelSpec, Record | None]:
    """Load the finetuned network of an experiment without quantizers, its spec, and the identity of its images."""
    net, space, subnet, images = load_finetuned(experiment)
    bare = build_subnet(space, subnet, FLOAT)
    state = net.state_dict()
    bare.load_state_dict({key: state[key] for key in bare.state_dict()})
    return bare, subnet_model(space, subnet), images


def _from_published(
    experiment: Experiment, state: Mapping[str, torch.Tensor], layout: Layout
) -> tuple[MBConvNet, SearchSpace, Subnet]:
    space = published_space(len(state[layout.key("classifier.weight")]))
    subnet = experiment.load_subnet(space)
    try:
        with without_weights():
            from_published(state, build_subnet(space, subnet, LINEAR), elastic=False)
        net = build_subnet(space, subnet, LINEAR)
        net.load_state_dict(from_published(state, net, elastic=False), strict=False)
    except UserError as error:
        raise UserError(f"{experiment.best_checkpoint} is not the network of {experiment.arch}: {error}") from error
    return net, space, subnet


def _rebuild(path: Path, data: Mapping[str, Any]) -> tuple[MBConvNet, SearchSpace, Subnet]:
    if missing := [key for key in ("space", "arch", "policy", "state_dict") if key not in data]:
        raise UserError(f"{path} is not a finetuned network: it lacks {', '.join(missing)}")
    space = space_from_dict(data["space"])
    if not (isinstance(data["arch"], dict) and isinstance(data["policy"], dict)):
        raise UserError(f"{path}: its architecture and its policy must be objects")
    subnet = subnet_from_spec(space, {**data["arch"], **data["policy"]})
    try:
        scheme = scheme_named(data.get("scheme", LINEAR.name))
        net = built_for(partial(build_subnet, space, subnet, scheme), data["state_dict"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return net, space, subnet
