"""Files that are whole or absent: atomic writes, and reads whose errors are one line."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np

from apq.errors import UserError

Record = dict[str, Any]  # plain data, as JSON holds it
SAVE_SECONDS = 1.0  # between saves of the state of a loop that may be faster than a disk


def cache_folder() -> Path:
    """The folder of files that can be made again: `$APQ_CACHE` or `~/.cache/apq`."""
    return Path(os.environ.get("APQ_CACHE") or Path.home() / ".cache" / "apq")


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` for writing. It replaces `path` (fsync, rename) only if the block succeeds.

    UserError where the file cannot be written, for example to a full disk. The old file then stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())  # mkstemp makes files that only the user may read
        Path(temporary).replace(path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {_one_line(error)}") from error
        raise


def check_writable(folder: Path) -> None:
    """Check before long work that files can be made in a folder, which need not exist yet; UserError if not."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"cannot write to {folder}: {existing} is not a folder that may be written")


def check_new(path: Path, overwrite: bool) -> None:
    """Check before any work that a file can be written and replaces nothing; UserError if not."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --out or give --overwrite")
    check_writable(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, atomically."""
    with atomic_open(path) as file:
        json.dump(data, file, indent=1)
        file.write("\n")


def read_json(path: Path) -> Any:
    """The JSON in a file; UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:  # not text and not JSON are both ValueErrors
        raise UserError(f"cannot read {path}: {_one_line(error)}") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, plain data only; UserError where it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            return dict(data)
    # All of these come from damaged archives; zipfile raises NotImplementedError for an unknown compression.
    except (OSError, ValueError, TypeError, KeyError, EOFError, NotImplementedError, RuntimeError, BadZipFile) as error:
        raise UserError(f"{path} is missing or damaged: {_one_line(error)}") from error


def append_jsonl(path: Path, record: Any) -> None:
    """Append one record as a line and flush it to disk. An incomplete last line, of a killed run, is cut off first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            _cut_torn_line(file)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {_one_line(error)}") from error


def read_jsonl(path: Path) -> list[Any]:
    """The records of a file of JSON lines, without an incomplete last line. UserError for other damage."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a file of JSON lines: {_one_line(error)}") from error


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write records as JSON lines, atomically."""
    with atomic_open(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _cut_torn_line(file: IO[bytes]) -> None:
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
