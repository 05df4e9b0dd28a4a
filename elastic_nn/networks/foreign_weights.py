"""The weights in files that other programs wrote: wrapped, with prefixes, in other floating-point types."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from apq.errors import UserError

# Under what keys training scripts keep weights, beside an optimizer's state and others; the first one counts.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
PREFIX, COMPILED = "module", "_orig_mod"  # of data-parallel training; of compiled modules, at any depth

# torchvision's training scripts save their flags beside the weights: plain attributes, which run no code when read.
torch.serialization.add_safe_globals([argparse.Namespace])


def unwrapped(data: Mapping[str, Any]) -> Any:
    """The weights in a file's data: under one of `WRAPPERS`, under the only other key with tensors alone, or all."""
    for name in WRAPPERS:
        if holds_tensors(data.get(name)) or (name == "state_dict" and name in data):
            return data[name]
    inside = [value for value in data.values() if holds_tensors(value)]
    return inside[0] if len(inside) == 1 else data


def holds_tensors(value: Any) -> bool:
    """Whether this may be weights: names and tensors."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def without_prefix(state: Mapping[Any, Any]) -> dict[str, Any]:
    """The weights without the prefixes `module.` and `_orig_mod.`, which wrappers of networks add to each key.

    UserError where a key occurs with and without them.
    """
    found = {_bare(str(key)): value for key, value in state.items()}
    if len(found) < len(state):
        raise UserError(f"weights have keys twice, with and without the prefix `{PREFIX}.` or `{COMPILED}.`")
    return found


def without_common_prefix(state: Mapping[str, Any], own: Collection[str]) -> Mapping[str, Any]:
    """The weights without a first name that all keys share, such as `model.`, unless a key of the network has it."""
    first = {key.partition(".")[0] + "." for key in state}
    if len(first) != 1 or any(key.startswith(tuple(first)) for key in own):
        return state
    return {key.removeprefix(*first): value for key, value in state.items()}


def in_types_of(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights in the types of the state `own` of a network: floats of other sizes are converted.

    UserError where a tensor is no ordinary one, or has whole numbers or truth values for floats, which would mean
    something else, such as codes of a quantized network.
    """
    return {key: _converted(key, value, own[key].dtype) if key in own else value for key, value in state.items()}


def _converted(key: str, value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or value.is_complex():  # `check_fit` names it
        return value
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UserError(f"tensor {key} is {value.dtype} of layout {value.layout}, not an ordinary tensor")
    if value.dtype == torch.bool or value.is_floating_point() != dtype.is_floating_point:
        raise UserError(f"tensor {key} has values of type {value.dtype}, where the network has {dtype}")
    return value.to(dtype)


def _bare(key: str) -> str:
    parts = [part for part in key.split(".") if part != COMPILED]
    while len(parts) > 1 and parts[0] == PREFIX:
        parts = parts[1:]
    return ".".join(parts)
