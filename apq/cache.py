"""Files that can be made again. A cache is never an error: a damaged one, or one that cannot be written, is absent."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from apq.errors import UserError
from apq.files import atomic_open, read_arrays

CHECKSUM = "checksum"  # the array that has it


def cache_folder() -> Path:
    """The folder of caches: `$APQ_CACHE` or `~/.cache/apq`, for a user without a home one in the temporary folder."""
    if given := os.environ.get("APQ_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "apq"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return Path(tempfile.gettempdir()) / f"apq-cache-{os.getuid()}"


def read_cache(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays that `write_cache` wrote, None where the file is missing, damaged or not of it."""
    try:
        arrays = read_arrays(file)
    except UserError:
        return None
    found = arrays.pop(CHECKSUM, None)
    return arrays if found is not None and np.array_equal(found, _checksum(arrays)) else None


def write_cache(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays with their checksum. Where they cannot be written, nothing happens."""
    with contextlib.suppress(OSError, UserError), atomic_open(file, "wb") as out:
        np.savez(out, **arrays, **{CHECKSUM: _checksum(arrays)})


def _checksum(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(32,) uint8 SHA-256 of names, types, shapes and bytes."""
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        hashed.update(f"{name} {array.dtype} {array.shape}\n".encode())
        hashed.update(array.tobytes())
    return np.frombuffer(hashed.digest(), dtype=np.uint8)
