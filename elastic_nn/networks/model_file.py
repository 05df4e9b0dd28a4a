"""The file of a float network other than a supernet: weights and spec, or the plain weights of a named network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apq.checkpoint import check_fit, load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.files import Record
from apq.model import ModelSpec, is_model, model_from_dict, model_to_dict
from apq.own_networks import LITES
from apq.skeleton import without_weights
from elastic_nn.networks.efficientnet_lite import from_published, is_published
from elastic_nn.networks.foreign_weights import (
    in_types_of,
    unwrapped,
    without_common_prefix,
    without_prefix,
)
from elastic_nn.networks.named_models import build_model, named_model


def save_model(
    path: Path, spec: ModelSpec, state_dict: Mapping[str, torch.Tensor], images: Record, **facts: Any
) -> None:
    """Write the weights of a network with its spec, the identity of its training images, and other facts."""
    save_checkpoint(path, {"model": model_to_dict(spec), "state_dict": dict(state_dict), "images": images, **facts})


def load_model(
    path: Path, name: str | None = None, n_classes: int | None = None
) -> tuple[nn.Module, ModelSpec, Record | None]:
    """Load the network of a file, its spec, and the identity of its images, if known.

    A file without a spec under "model" has the plain weights of the network `name` for ImageNet's channels and
    resolution, with as many classes as its classifier has outputs. They may be wrapped and have prefixes, see
    `foreign_weights`; those of an EfficientNet-Lite may have the names of the published files. UserError where the
    weights do not fit, or where `name` or `n_classes` differ from the file.
    """
    data = load_checkpoint(path)
    if not is_model(data.get("model")):
        return *_from_plain(path, data, name, n_classes), None
    try:
        spec = model_from_dict(data["model"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for what, asked in (("name", name), ("n_classes", n_classes)):
        if asked is not None and asked != getattr(spec, what):
            raise UserError(f"{path} holds a network of {what} {getattr(spec, what)}, not {asked}")
    return _with_weights(path, spec, data.get("state_dict")), spec, data.get("images")


def _from_plain(path: Path, data: Record, name: str | None, n_classes: int | None) -> tuple[nn.Module, ModelSpec]:
    if name is None:
        raise UserError(f"{path} does not say which network it holds: give its name")
    spec = named_model(name, "imagenet")
    with without_weights():
        own = build_model(spec if n_classes is None else replace(spec, n_classes=n_classes)).state_dict()
    state = unwrapped(data)
    if isinstance(state, Mapping):
        try:
            state = without_common_prefix(without_prefix(state), own)
            if name in LITES and is_published(state):
                state = from_published(state, LITES[name])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    spec = replace(spec, n_classes=_classes(own, state) if n_classes is None else n_classes)
    return _with_weights(path, spec, state), spec


def _classes(network: Mapping[str, torch.Tensor], state: Any) -> int:
    """Number of outputs of the classifier, which is the last matrix: in the weights, or else in the network."""
    key, own = [(key, value) for key, value in network.items() if value.ndim >= 2][-1]
    saved = state.get(key) if isinstance(state, Mapping) else None
    fits = isinstance(saved, torch.Tensor) and saved.ndim >= 2 and len(saved) > 0
    return len(saved if fits else own)


def _with_weights(path: Path, spec: ModelSpec, state: Any) -> nn.Module:
    try:
        with without_weights():
            own = build_model(spec).state_dict()
        if isinstance(state, Mapping):  # files of torch before 0.4.1 have no counts of batches
            counts = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
            counts = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in counts.items()}
            state = {**counts, **in_types_of(own, state)}
        check_fit(state, own)
    except UserError as error:
        raise UserError(f"{path}, model {spec.name}: {error}") from error
    net = build_model(spec)
    net.load_state_dict(state)
    return net
