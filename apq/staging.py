"""A folder is built beside the one that it replaces, and then takes its place by a rename.

At any instant the old or the new folder is there, whole. Linux exchanges two folders in one step; on file systems
without that there are two renames, and the next run repairs what a kill between them left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

NEW, OLD = "new", "old"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


def stage(folder: Path) -> Path:
    """Make an empty folder beside `folder`, with a name that no other run has. OSError where that fails."""
    new = folder.with_name(f".{folder.name}.{NEW}-{secrets.token_hex(4)}")
    new.mkdir(parents=True)
    if folder.exists():
        shutil.copymode(folder, new)
    return new


def staged(folder: Path) -> list[Path]:
    """The folders beside `folder` that killed runs left, if the lock of `folder` is held."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.({NEW}|{OLD})-[0-9a-f]{{8}}", re.DOTALL)
    try:
        return [path for path in sorted(folder.parent.iterdir()) if name.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []


def link_into(new: Path, folder: Path, names: Iterable[str]) -> None:
    """Give a staged folder these files of `folder` as well: hard links, or copies where there are none."""
    for name in names:
        file, target = folder / name, new / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(file, target, follow_symlinks=False)


def put_in_place(new: Path, folder: Path) -> Path | None:
    """Rename a staged folder to `folder`. Returns where the old one is now, None if there was none.

    OSError where that fails; the old folder is in its place then.
    """
    for inner in (new, *(path for path in new.rglob("*") if path.is_dir() and not path.is_symlink())):
        sync(inner)
    if not folder.exists():
        new.rename(folder)
        old = None
    elif exchange(new, folder):
        old = new
    else:
        old = new.with_name(new.name.replace(f".{NEW}-", f".{OLD}-"))
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
    sync(folder.parent)
    return old


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step. False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    return call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def restore(folder: Path) -> None:
    """Put the old folder back where a kill between two renames has left none."""
    olds = [path for path in staged(folder) if f".{OLD}-" in path.name]
    if olds and not folder.exists():
        olds[-1].rename(folder)


def sync(folder: Path) -> None:
    """Have the names in a folder on disk, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def carry_over(old: Path, folder: Path, names: Iterable[str]) -> None:
    """Move these files and folders of others from the old folder to the one in its place. None replaces another."""
    for name in sorted(names):
        with contextlib.suppress(OSError):  # what cannot be moved stays where it is
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(target):
                (old / name).rename(target)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove these files, and the folder if nothing else is in it. What cannot be removed stays."""
    unlink(folder, names)
    for path in (folder / "checkpoint", folder):
        with contextlib.suppress(OSError):
            path.rmdir()


def unlink(folder: Path, names: Iterable[str]) -> None:
    """Remove these files, and the folders inside the folder that they were the last of."""
    inner = {parent for name in names for parent in (folder / name).parents if folder in parent.parents}
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for path in sorted(inner, reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
