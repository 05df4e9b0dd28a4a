"""Files that are whole or absent: atomic writes, and reads that complain in one line."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from apq.errors import UserError


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour for writing; it replaces `path` (fsync, rename) only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it private to the user
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, atomically."""
    with atomic_open(path) as file:
        json.dump(data, file, indent=1)
        file.write("\n")


def read_json(path: Path) -> Any:
    """The JSON in a file; UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {_one_line(error)}") from error


def append_jsonl(path: Path, record: Any) -> None:
    """Append one record as a line and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[Any]:
    """Every whole record of a file of lines; the torn last line of a killed run is dropped from the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    whole, torn = lines[:-1], lines[-1]
    if torn:
        with atomic_open(path, "wb") as file:
            file.writelines(line + b"\n" for line in whole)
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a file of JSON lines: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]
