"""Temporary files that killed runs left. Files of users are never taken for them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

# `apq.files.atomic_open` writes NAME as `.NAME.xxxxxxxx`: eight characters that `tempfile` draws from these.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<drawn>[a-z0-9_]{8})", re.DOTALL)
PRIVATE = 0o600  # the mode that `tempfile` gives, until the file is whole
OLD_S = 24 * 3600.0  # no write takes a day


def is_temporary(file: Path, is_own: Callable[[str], bool]) -> bool:
    """Whether a file is what a killed write of one of the own names left.

    A word or a date is no such ending: what is not private must have a digit and a letter among its eight characters.
    """
    if not (found := TEMPORARY.fullmatch(file.name)) or not is_own(found["name"]):
        return False
    if file.is_symlink() or not file.is_file():
        return False
    mixed = re.search(r"\d", found["drawn"]) and re.search(r"[a-z_]", found["drawn"])
    return bool(mixed) or file.stat().st_mode & 0o777 == PRIVATE


def sweep(folder: Path, is_own: Callable[[str], bool], *, older_than_s: float | None = None) -> None:
    """Remove the temporaries of own names in a folder. Who calls holds the folder's lock, or gives an age."""
    with contextlib.suppress(OSError):  # no folder: nothing to sweep
        for file in list(folder.iterdir()):
            if is_temporary(file, is_own) and (
                older_than_s is None or time.time() - file.stat().st_mtime > older_than_s
            ):
                file.unlink()


def sweep_cache(folder: Path) -> None:
    """Sweep a folder of caches, which has no lock: another process may be writing there now."""
    sweep(folder, lambda name: name.endswith(".npz"), older_than_s=OLD_S)
