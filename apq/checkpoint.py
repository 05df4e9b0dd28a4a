"""Torch files on disk: written atomically, read as data only."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from apq.bounds import MB, check_archive, is_number, is_whole, open_file
from apq.errors import UserError
from apq.files import atomic_open
from apq.schema import anything, each, fields, mapping

ZIP = b"PK"  # how a file of torch since 1.6 begins
MOST_PLAIN = 64 * MB  # bytes of the plain values in a checkpoint, with the names and shapes of its tensors
MOST_REPEATED = 8  # how often, on average, values and numbers may be repeated, for example by tied weights
DEEPEST = 64  # levels of nested values
STATES = {  # what optimizers keep of each parameter that they have changed
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}
TENSORS = (torch.Tensor, torch.nn.Parameter)
PLAIN = (bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)


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

    UserError where the file is missing, truncated, not a checkpoint, holds code, declares more than it holds, does not
    agree with its checksums, or lacks a required key.
    """
    try:
        data = _read(path)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except UserError:
        raise
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


def _read(path: Path) -> Any:
    """The contents of a file, if it holds all that it declares; UserError or any other exception if not."""
    with open_file(path) as file, _naming(path):
        size = os.fstat(file.fileno()).st_size
        if file.read(len(ZIP)) == ZIP:  # others are files of torch before 1.6
            plain = [part.file_size for part in check_archive(file) if part.filename.endswith("/data.pkl")]
            if sum(plain) > MOST_PLAIN:
                raise UserError(f"its plain values have more than {MOST_PLAIN // MB} MB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about pickles that it then refuses
        data = torch.load(path, map_location="cpu", weights_only=True)
    with _naming(path):
        _check_held(data, size)
    return data


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Context whose UserErrors begin with the path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} is damaged or not a checkpoint: {error}") from error


def _check_held(data: Any, size: int) -> None:
    """UserError unless a file of `size` bytes can hold all that was read from it, as plain values and plain tensors.

    A pickle may declare tensors that are larger than what it stores, of any shape: torch takes memory for them, which
    costs nothing until somebody looks at the numbers. So nobody may, before this. Values may also repeat each other,
    level after level, until they are too many to be visited.
    """
    todo, n_values, declared, storages = [(data, 0)], 0, 0, {}
    while todo:
        value, depth = todo.pop()
        n_values += 1
        if n_values > MOST_REPEATED * size or depth > DEEPEST:
            raise UserError("its values are nested too deep, or repeated too often")
        if isinstance(value, torch.Tensor):
            if type(value) not in TENSORS or value.layout != torch.strided or value.is_quantized or not value.is_cpu:
                raise UserError("it holds a tensor that is not a plain one")
            declared += math.prod(max(1, n) for n in value.shape) * value.element_size()
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (Mapping, argparse.Namespace)):
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            todo += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple, set)):
            todo += [(item, depth + 1) for item in value]
        elif not (value is None or isinstance(value, PLAIN)):
            raise UserError(f"it holds a {type(value).__name__}")
    if sum(storages.values()) > size or declared > MOST_REPEATED * size:
        raise UserError("its tensors declare more numbers than it holds")


def check_fit(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that `found` has exactly the expected keys, as tensors of the expected shapes, real and finite.

    Running variances of norms must not be negative.

    Numbers with a fraction may have any precision; whole numbers do not stand for them, nor the other way round. The
    numbers are looked at last: only then it is known how many there are. UserError names the first keys that are
    missing, extra or do not fit, and says how many there are.
    """
    if not isinstance(found, Mapping):
        raise UserError(f"weights must be names and tensors, not a {type(found).__name__}")
    if not_real := [key for key, value in found.items() if not isinstance(value, torch.Tensor) or value.is_complex()]:
        raise UserError(f"weights must be names and tensors of real numbers only, not {not_real[0]}")
    both = {key: (found[key], tensor) for key, tensor in expected.items() if key in found}
    _complain(
        {
            "missing": [key for key in expected if key not in found],
            "extra": [key for key in found if key not in expected],
            "of another shape": [
                f"{key} {tuple(own.shape)} for {tuple(tensor.shape)}"
                for key, (own, tensor) in both.items()
                if own.shape != tensor.shape
            ],
            "of another type": [
                f"{key} {own.dtype} for {tensor.dtype}"
                for key, (own, tensor) in both.items()
                if own.is_floating_point() != tensor.is_floating_point()
            ],
        }
    )
    variances = {key: value for key, value in found.items() if key.rpartition(".")[2] == "running_var"}
    _complain(
        {
            "not finite": [key for key, value in found.items() if not torch.isfinite(value).all()],
            "with negative variances": [key for key, value in variances.items() if (value < 0).any()],
        }
    )


def check_optimizer(found: Any, optimizer: torch.optim.Optimizer) -> None:
    """Check that `found` is a state of this optimizer: its settings, and finite tensors of its parameters' shapes.

    UserError if not.
    """
    fields(state=anything, param_groups=each(mapping, len(optimizer.param_groups)))(found)
    for own, group in zip(optimizer.state_dict()["param_groups"], found["param_groups"], strict=True):
        check_settings(group, own)
        if changed := [name for name in own if name != "lr" and group[name] != own[name]]:
            raise UserError(f"its optimizer has another {changed[0]}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(found["state"], Mapping):
        raise UserError("its optimizer has no state")
    for index, values in found["state"].items():
        if not is_whole(index, 0, len(parameters) - 1) or not isinstance(values, Mapping):
            raise UserError("its optimizer has states of other parameters")
        if values.keys() != next((own for kind, own in STATES.items() if isinstance(optimizer, kind)), values.keys()):
            raise UserError(f"its optimizer lacks a part of the state of parameter {index}")
        for name, value in values.items():
            plain = value is None or is_number(value)
            fits = isinstance(value, torch.Tensor) and value.shape in (parameters[index].shape, torch.Size([]))
            if not plain and not (fits and not value.is_complex() and torch.isfinite(value).all()):
                raise UserError(f"its optimizer has {name} that does not fit parameter {index}")


def check_settings(found: Any, own: Mapping[str, Any]) -> None:
    """Check that plain settings of an optimizer or a schedule have the keys and types of the present ones.

    UserError if not.
    """
    same = isinstance(found, Mapping) and found.keys() == own.keys()
    if not same or not all(_is_like(found[name], own[name]) for name in own):
        raise UserError("it has settings of another optimizer or schedule")


def _is_like(value: Any, own: Any) -> bool:
    """Whether a setting is the present one, or both are numbers."""
    if isinstance(own, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(value) == len(own)
        return same and all(map(_is_like, value, own))
    return is_number(value) if is_number(own) else type(value) is type(own) and value == own


def _complain(by_problem: Mapping[str, list[Any]]) -> None:
    """UserError if there are keys with problems."""
    problems = [
        f"{len(keys)} {what} ({', '.join(map(str, keys[:5]))}{', ...' if len(keys) > 5 else ''})"
        for what, keys in by_problem.items()
        if keys
    ]
    if problems:
        raise UserError("weights do not fit the network, keys: " + "; ".join(problems))


def trained_for(predictor: Path) -> str | None:
    """Digest of the supernet whose pairs the predictor in a file was trained on; None where it is not known."""
    made_by = load_checkpoint(predictor).get("data") if predictor.exists() else None
    return made_by.get("supernet") if isinstance(made_by, dict) else None
