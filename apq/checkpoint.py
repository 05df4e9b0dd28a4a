"""Torch files on disk: written atomically, read as data only."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apq.errors import UserError
from apq.files import atomic_open


def save_checkpoint(path: Path, data: Mapping[str, Any]) -> None:
    """Write a dict of tensors and plain values, whole or not at all. UserError where it cannot be written."""
    with atomic_open(path, "wb") as file:
        try:
            torch.save(data, file)
        except RuntimeError as error:  # raised by torch's archive writer, for example when the disk is full
            raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """A hash that identifies weights: of their names, shapes and bytes."""
    hashed = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().numpy()
        hashed.update(f"{name} {array.dtype} {array.shape}\n".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def load_checkpoint(path: Path, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a dict of tensors and plain values onto the CPU. Code in the pickle is never run.

    UserError where the file is missing, truncated, not a checkpoint, holds code, or lacks a required key.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles that it then refuses
            data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a plain checkpoint: it is damaged or holds more than tensors, not loaded"
        ) from error
    except Exception as error:  # damaged archives and pickles raise exceptions of any type
        raise UserError(f"{path} is truncated or not a checkpoint") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not a checkpoint")
    if missing := [key for key in required if key not in data]:
        raise UserError(f"{path} is not the expected kind of checkpoint: it lacks {', '.join(missing)}")
    return data


def check_fit(found: Mapping[str, Any], expected: Mapping[str, torch.Size]) -> None:
    """Check that `found` has exactly the expected keys, as real and finite tensors of the expected shapes.

    UserError names the first keys that are missing, extra or misshapen, and says how many there are.
    """
    if not isinstance(found, Mapping):
        raise UserError(f"weights must be names and tensors, not a {type(found).__name__}")
    if not_real := [key for key, value in found.items() if not isinstance(value, torch.Tensor) or value.is_complex()]:
        raise UserError(f"weights must be names and tensors of real numbers only, not {not_real[0]}")
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    misshapen = [
        f"{key} {tuple(found[key].shape)} for {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and found[key].shape != shape
    ]
    not_finite = [key for key, value in found.items() if not torch.isfinite(value).all()]
    by_problem = {"missing": missing, "extra": extra, "of another shape": misshapen, "not finite": not_finite}
    problems = [
        f"{len(keys)} {what} ({', '.join(map(str, keys[:5]))}{', ...' if len(keys) > 5 else ''})"
        for what, keys in by_problem.items()
        if keys
    ]
    if problems:
        raise UserError("weights do not fit the network, keys: " + "; ".join(problems))
