"""What a file says about itself is checked before it is believed: its kind, its size, the sizes that it declares.

A reader takes no more memory and time than a file of its size deserves, whatever the file declares.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from apq.errors import UserError

MB = 1 << 20
MOST_TEXT = 64 * MB  # bytes of a JSON or CSV file; the largest in use, fronts and cost tables, have a few
MOST_LINES = 1024 * MB  # bytes of a file of JSON lines
MOST_LINE = 16 * MB  # bytes of one of its lines
LARGEST_NUMBER = 1e300  # of a plain number: sums of several are still finite
KINDS = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}  # of .npy files


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes.

    UserError for pipes, devices and folders: to open them may wait, to read them may never end. OSError as from `open`.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(handle).st_mode
    if kind := other_kind(mode):
        os.close(handle)
        raise UserError(f"{path} is {kind}, not a file")
    with os.fdopen(handle, "rb") as file:
        yield file


def other_kind(mode: int) -> str | None:
    """What a path with this `st_mode` is that is no plain file, None for a plain file."""
    if stat.S_ISREG(mode):
        return None
    return "a " + next((kind for kind, is_kind in KINDS.items() if is_kind(mode)), "device")


def check_file(path: Path) -> None:
    """Check that others may open this path, see `open_file`."""
    with open_file(path):
        pass


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """All bytes of a file. UserError if it has more than `most`, and as from `open_file`."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most or len(data := file.read(most + 1)) > most:
            raise UserError(f"{path} has more than {most // MB} MB, too much for a file of its kind")
    return data


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends, but not a last one without an end. UserError if it is too large."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_LINES:
            raise UserError(f"{path} has more than {MOST_LINES // MB} MB, too much for a file of its kind")
        while (line := file.readline(MOST_LINE)).endswith(b"\n"):
            yield line[:-1]
        if len(line) == MOST_LINE:
            raise UserError(f"{path} has a line of more than {MOST_LINE // MB} MB")


def check_archive(file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """Check the directory and the checksums of a zip archive, as numpy and torch write them: not compressed.

    Returns its directory. UserError where parts together are larger than the file, as those of a bomb are, and where
    the contents of a part do not agree with its checksum, which torch itself does not compare. If torch was told to
    write no checksums, all of them are zero.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise UserError("it is compressed, which this kind of file never is")
        if sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size:
            raise UserError("it declares more than it holds")
        if len({part.filename for part in parts}) < len(parts):
            raise UserError("it has two parts of one name")
        if any(part.CRC for part in parts):
            damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"the checksum of its part {damaged} does not agree")
    return parts


def check_arrays(file: IO[bytes]) -> None:
    """Check that the arrays of an .npz file have the sizes that their headers declare. UserError where not."""
    parts = check_archive(file)
    with zipfile.ZipFile(file) as archive:
        for part in parts:
            with archive.open(part) as data:
                version = np.lib.format.read_magic(data)
                if version not in HEADERS:
                    raise UserError(f"{part.filename} has an unknown version of the format, {version}")
                shape, _, dtype = HEADERS[version](data)
                held = part.file_size - data.tell()
            if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
                raise UserError(f"{part.filename} declares {dtype} of shape {shape}, but holds {held} bytes")


def is_number(value: Any, low: float = -LARGEST_NUMBER, high: float = LARGEST_NUMBER) -> bool:
    """Whether a plain value is a finite number from `low` to `high`. Whole numbers may have any number of digits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a plain value is a whole number from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
