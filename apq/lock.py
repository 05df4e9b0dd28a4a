"""Locks of folders: one run at a time writes an experiment, a folder of models or a store of pairs.

The lock of `exps/NAME` is the file `exps/.NAME.lock` (`fcntl.flock`). It is held for the life of a run. The system
releases it when the process ends in any way, so that a file left by a killed run is no obstacle. That file tells the
next run whether the killed one had put its result in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apq.errors import UserError
from apq.files import check_writable

PATIENCE_S, PAUSE_S = 1.0, 0.02  # a holder writes its process into the file at once after it has the lock
MOST_SHOWN = 120  # characters of a command in a message
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have none

Note = dict[str, Any]


class InUseError(UserError):
    """Another run works in the folder."""


@dataclass
class Lock:
    """The lock of a folder, held by this process.

    Attributes:
        folder: the folder, without symbolic links.
        file: descriptor of the lock's file.
        finished: whether the last run was this very command, and was killed when its result was in place already.
        replaced: identity of what the result of a killed run was to replace or has replaced.
        seen: what the folder's owner saw there at the start.
    """

    folder: Path
    file: int
    finished: bool = False
    replaced: list[int] | None = None
    seen: Any = None
    _note: Note = field(default_factory=dict)

    def publishing(self, result: Path, *, more: bool = False) -> None:
        """Note that `result` is about to be put in place by a rename. A kill after it leaves a finished run.

        With `more` the run goes on after it: killed then, it is not finished.
        """
        self._note |= {"result": str(result), "was": identity(result), "more": more}
        _write(self.file, self._note)

    def cleared(self) -> None:
        """Note that nothing of a killed run is left."""
        self.replaced = None
        self._note.pop("was", None)
        _write(self.file, self._note)

    @property
    def published(self) -> bool:
        """Whether this run has put its result in place."""
        return _published(self._note)


_held: dict[Path, Lock] = {}  # of this process, by folder


def real(folder: Path) -> Path:
    """The folder itself: absolute, without symbolic links. It need not exist."""
    return Path(os.path.realpath(folder))


def lock_file(folder: Path) -> Path:
    """The file of a folder's lock, beside the folder. UserError for the root of all folders, which has no beside."""
    place = real(folder)
    if not place.name:
        raise UserError(f"{folder} is the root of all folders: give a folder in it")
    return place.with_name(f".{place.name}.lock")


def identity(path: Path) -> list[int] | None:
    """Numbers that tell a file or folder from another one of the same name; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Hold the lock of a folder, which need not exist, in the block. A block inside such a block shares it.

    InUseError names the process that holds it. UserError where the lock cannot be made.
    """
    place = real(folder)
    if place in _held:
        yield _held[place]
        return
    new_parents = [parent for parent in place.parents if not parent.exists()]
    lock = _held[place] = _take(folder, place)
    try:
        yield lock
    except Exception:
        _release(lock, new_parents)
        raise
    except BaseException:  # interrupted: like a kill, it may come when the result is in place
        _release(lock, new_parents, keep=lock.published)
        raise
    _release(lock, new_parents)


def _take(folder: Path, place: Path) -> Lock:
    path = lock_file(place)
    check_writable(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                _flock(file, folder)
                if identity(path) == [os.fstat(file).st_dev, os.fstat(file).st_ino]:
                    break  # else its last holder has just removed it
            except BaseException:
                os.close(file)
                raise
            os.close(file)
    except OSError as error:
        raise UserError(f"cannot lock {folder}: {path}: {error.strerror or error}") from error
    try:
        return _signed(place, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if os.fstat(file).st_size == 0:  # made by this run
                path.unlink()
        os.close(file)
        if isinstance(error, OSError):
            raise UserError(f"cannot lock {folder}: {path}: {error.strerror or error}") from error
        raise


def _signed(place: Path, file: int) -> Lock:
    """The lock in a file that this process has locked, after writing who holds it into the file.

    What the last run was to replace stays there, until `Lock.cleared`.
    """
    before = _read(file)
    if before is None:
        raise UserError(f"{lock_file(place)} is in the way: it is not a lock of this program")
    me: Note = {"command": shlex.join(sys.argv), "folder": str(Path.cwd())}
    finished = _published(before) and not before.get("more") and {key: before.get(key) for key in me} == me
    note = {"pid": os.getpid(), "host": platform.node(), **me, "was": before.get("was")}
    lock = Lock(place, file, finished, before.get("was"), _note=note)
    _write(file, note)
    return lock


def _flock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(f"{folder} is in use by {_holder(file)}: wait until it ends, or choose another") from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        print(f"{folder}: its file system has no locks; let no other run write there", file=sys.stderr)


def _release(lock: Lock, new_parents: list[Path], *, keep: bool = False) -> None:
    """Give the lock up. Its file goes, and so do folders that were made for it and are empty."""
    _held.pop(lock.folder, None)
    with contextlib.suppress(OSError):
        if not keep:
            lock_file(lock.folder).unlink()  # before the lock is given up: after it, it may be another run's
        os.close(lock.file)
        for parent in new_parents:
            parent.rmdir()


def _holder(file: int) -> str:
    """The process that holds the lock, in words."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        note = _read(file) or {}
        away = note.get("host") != platform.node()
        if note.get("pid") and (away or _alive(note["pid"])):
            command = str(note.get("command", ""))
            command = command if len(command) <= MOST_SHOWN else f"{command[:MOST_SHOWN]}..."
            return f"process {note['pid']}{' on ' + str(note.get('host')) if away else ''} ({command})"
        time.sleep(PAUSE_S)  # the file is of a killed run still
    return "another process"


def _alive(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return True


def _published(note: Note) -> bool:
    if not isinstance(note.get("result"), str):
        return False
    now = identity(Path(note["result"]))
    return now is not None and now != note.get("was")


def _write(file: int, note: Note) -> None:
    os.pwrite(file, json.dumps(note).encode() + b"\n", 0)


def _read(file: int) -> Note | None:
    """The first line of a lock's file: one write, so that no kill tears it. None if the file is not a lock's."""
    line = os.pread(file, 1 << 16, 0).partition(b"\n")[0]
    if not line:
        return {}
    try:
        note = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) and "pid" in note else None


def _forget() -> None:
    """Hold no locks in a forked process: a loader's worker outlives a killed run for seconds."""
    for lock in _held.values():
        os.close(lock.file)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
