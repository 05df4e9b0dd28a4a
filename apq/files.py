"""Files that are whole or absent: atomic writes, and reads whose errors are one line.

Every reader of a file has its decoder in the block of `reading`, the one place that turns what a file or the system
raises into a UserError.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from apq.bounds import check_arrays, open_file, other_kind, read_bytes, read_lines
from apq.errors import UserError, one_line

Record = dict[str, Any]  # plain data, as JSON holds it
LONG, LARGEST = re.compile("[0-9]{19}"), 2**63 - 1  # digits of a number that may have more than 64 bits
SAVE_SECONDS = 1.0  # between saves of the state of a loop that may be faster than a disk


def cache_folder() -> Path:
    """The folder of caches: `$APQ_CACHE` or `~/.cache/apq`, for a user without a home one in the temporary folder."""
    if given := os.environ.get("APQ_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "apq"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return Path(tempfile.gettempdir()) / f"apq-cache-{os.getuid()}"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context in which a file is opened and decoded: whatever is raised there is a UserError of one line.

    Of a damaged file a decoder can raise anything, also TypeError, struct.error, RecursionError or MemoryError. So the
    block holds the decoder alone: a fault of the program in it would be taken for one of the file. A UserError that
    names the path passes.
    What is not a plain file is refused before it is opened: a pipe would wait, a device has no end.
    """
    try:
        if kind := other_kind(path.stat().st_mode):
            raise UserError(f"cannot read {path}: it is {kind}, not a file")
        yield
    except Exception as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` for writing. It replaces `path` (fsync, rename) only if the block succeeds.

    UserError where the file cannot be written, for example to a full disk. The old file then stays.
    """
    temporary = None
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())  # mkstemp makes files that only the user may read
        Path(temporary).replace(path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {one_line(error)}") from error
        raise


def _check_replaceable(path: Path) -> None:
    """UserError for what is there and is no plain file. A rename would replace even a device such as /dev/null."""
    if path.exists() and (kind := other_kind(path.stat().st_mode)):
        raise UserError(f"cannot write {path}: it is {kind}, not a file")


def check_writable(folder: Path) -> None:
    """Check before long work that files can be made in a folder, which need not exist yet; UserError if not."""
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    except OSError as error:  # for example of a name that is too long
        raise UserError(f"cannot write to {folder}: {one_line(error)}") from error
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
    """The JSON in a file; UserError where it is missing or broken, or has one key with two values."""
    with reading(path):
        return _parsed(read_bytes(path).decode("utf-8-sig"))


def _parsed(text: str) -> Any:
    """The JSON in a text. ValueError for whole numbers beyond 64 bits, which arrays and floats cannot hold."""
    return json.loads(text, parse_int=_whole if LONG.search(text) else None, object_pairs_hook=_unambiguous)


def _parsed_line(line: bytes, number: int) -> Any:
    try:
        return _parsed(line.decode())
    except ValueError as error:
        raise ValueError(f"line {number}: {one_line(error)}") from error


def _whole(digits: str) -> int:
    if not -LARGEST - 1 <= (value := int(digits)) <= LARGEST:
        raise ValueError(f"the number {digits[:20]}... has more than 64 bits")
    return value


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, plain data only; UserError where it is missing or damaged."""
    with reading(path), open_file(path) as file:
        check_arrays(file)
        file.seek(0)
        with np.load(file, allow_pickle=False) as data:
            return dict(data)


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
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def read_jsonl(path: Path) -> list[Any]:
    """The records of a file of JSON lines, without an incomplete last line. UserError for other damage."""
    if not path.exists():
        return []
    with reading(path):
        return [_parsed_line(line, number) for number, line in enumerate(read_lines(path), start=1)]


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write records as JSON lines, atomically."""
    with atomic_open(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. ValueError where a key has two values, of which JSON would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs) and (twice := [key for key, value in pairs if value != found[key]]):
        raise ValueError(f"key {twice[0]!r} has two values")
    return found


def _cut_torn_line(file: IO[bytes]) -> None:
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
