"""Files in the cache folder, which can be made again: a damaged one is made again, and never an error."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from apq.errors import UserError
from apq.files import atomic_open, read_arrays
from apq.leftovers import sweep_cache

CHECKSUM = "checksum"  # name of the array that holds the checksum of the others

Form = tuple[tuple[int | None, ...], str]  # shape, None where any length fits, and name of the dtype


def write_cache(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays with their checksum. They can be used even where this fails, so that failure is silent."""
    with contextlib.suppress(OSError, UserError), atomic_open(file, "wb") as out:
        np.savez(out, **arrays, **{CHECKSUM: _checksum(arrays)})
    sweep_cache(file.parent)


def read_cache(file: Path, forms: Mapping[str, Form]) -> dict[str, np.ndarray] | None:
    """The arrays of a cache. None where it is missing or damaged, or where the arrays have other names or forms."""
    try:
        arrays = read_arrays(file)
    except UserError:
        return None
    written = arrays.pop(CHECKSUM, None)
    if arrays.keys() != forms.keys() or not all(_has_form(arrays[name], form) for name, form in forms.items()):
        return None
    return arrays if np.array_equal(written, _checksum(arrays)) else None


def _has_form(array: np.ndarray, form: Form) -> bool:
    shape, dtype = form
    same = [expected in (None, n) for n, expected in zip(array.shape, shape, strict=False)]
    return array.dtype == dtype and array.ndim == len(shape) and all(same)


def _checksum(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(32,) uint8 hash of names, types, shapes and bytes."""
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        hashed.update(np.ascontiguousarray(arrays[name]).tobytes())
    return np.frombuffer(hashed.digest(), dtype=np.uint8)
