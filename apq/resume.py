"""Unfinished work on disk, so that a killed run continues.

`Resume` keeps one state in one file, with checksums. `Journal` keeps independent records, one line each. Both record
what was asked and refuse to continue where something else is asked.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.files import SAVE_SECONDS, append_jsonl, read_json, read_jsonl, write_json
from apq.leftovers import sweep
from apq.schema import Check

FORMAT = 2  # raise it when results of a training change: states of other versions are refused
SUFFIX = ".state.pt"  # of state files; a finetune's has its published name instead
MOST_SHOWN = 4  # differences that a message shows
SHOWN = 40  # most characters of a value in a message
ARRAY = "__ndarray__"  # marks a numpy array, which is stored as a tensor

State = dict[str, Any]


def difference(found: Any, asked: Any) -> str:
    """Describe where what was asked then (`found`) and what is asked now differ; "" if nowhere.

    >>> difference({"seed": 0, "search": {"population": 9}}, {"seed": 1, "search": {"population": 9}})
    'seed was 0, is 1'
    """
    parts = list(_differences(_plain(found), _plain(asked), ""))
    more = [f"and {len(parts) - MOST_SHOWN} more"] if len(parts) > MOST_SHOWN else []
    return "; ".join([*parts[:MOST_SHOWN], *more])


def _differences(found: Any, asked: Any, path: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in sorted({*found, *asked}):
            inner = f"{path}.{key}" if path else key
            if key not in asked or key not in found:
                yield f"{inner} was {'given' if key in found else 'not given'}, is {'given' if key in asked else 'not'}"
            else:
                yield from _differences(found[key], asked[key], inner)
    elif found != asked and _short(found, asked):
        yield f"{path} was {json.dumps(found)}, is {json.dumps(asked)}"
    elif found != asked and isinstance(found, list) and isinstance(asked, list) and len(found) == len(asked):
        for i, (then, now) in enumerate(zip(found, asked, strict=True)):
            yield from _differences(then, now, f"{path}[{i}]")
    elif found != asked:
        yield f"{path} changed"


def _short(*values: Any) -> bool:
    return all(len(json.dumps(value)) <= SHOWN for value in values)


def _plain(value: Any) -> Any:
    """The value as JSON returns it, so that it can be compared with the contents of a file."""
    return json.loads(json.dumps(value, default=str))


def _refuse(where: Path, what: str, found: Any, asked: Any, remedy: str) -> None:
    """UserError unless the same is asked. Nothing else compares what was asked."""
    if differs := difference(found, asked):
        raise UserError(f"{where} belongs to another {what}: {differs}; {remedy}")


class Resume:
    """The state of long work in a file, from which a killed run continues.

    Args:
        file: the state file; None keeps no state.
        asked: all that the result depends on, as plain data. The state of other work is a UserError.
        what: names the work in messages.
        restart: drop the state of other work instead of raising UserError.
        every_s: seconds between saves, for loops that are faster than a disk: they save when `due`.
        writes: whether this process writes the file; of several processes one does.
    """

    def __init__(
        self,
        file: Path | None,
        asked: Mapping[str, Any],
        what: str,
        restart: bool = False,
        *,
        every_s: float = 0.0,
        writes: bool = True,
    ) -> None:
        self.file, self.asked, self.what, self.restart = file, dict(asked), what, restart
        self.every_s, self.writes = every_s, writes
        self._saved_at = time.monotonic()

    def load(self, check: Check = lambda state: None) -> State | None:
        """The state that was saved last, or None. UserError if it is damaged, fails the check, or is of other work."""
        self._saved_at = time.monotonic()
        self._remove_temporaries()
        if self.file is None or not self.file.exists():
            return None
        try:
            return self._checked(check)
        except UserError:
            if self.restart:
                return None
            raise

    def _checked(self, check: Check) -> State:
        """The state in the file, as `load` returns it."""
        from apq.checkpoint import load_checkpoint  # needs torch

        remedy = "give --overwrite to start anew, or remove it"
        try:
            data = load_checkpoint(self.file, ("format", "asked", "state"))
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        if not isinstance(data["format"], int) or data["format"] != FORMAT:
            raise UserError(f"{self.file} was written by another version of this program; {remedy}")
        try:
            asked = json.loads(data["asked"])
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{self.file} is damaged: it does not say what was asked; {remedy}") from error
        _refuse(self.file, self.what, asked, self.asked, remedy)
        try:
            state = _decoded(data["state"])
            check(state)
        except UserError as error:
            raise UserError(f"{self.file} is damaged: {error}; {remedy}") from error
        return state

    def save(self, state: State) -> None:
        """Save a state of tensors, numpy arrays and plain data in place of the last one, whole or not at all."""
        if self.file is not None and self.writes:
            from apq.checkpoint import save_checkpoint

            asked = json.dumps(self.asked, default=str)
            save_checkpoint(self.file, {"format": FORMAT, "asked": asked, "state": _encoded(state)})
        self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether `every_s` seconds have passed since the last save."""
        return self.file is not None and self.writes and time.monotonic() - self._saved_at >= self.every_s

    def done(self) -> None:
        """Remove the state, once the result is stored."""
        if self.file is not None and self.writes:
            self.file.unlink(missing_ok=True)
            self._remove_temporaries()

    def stage(self, name: str, **changes: Any) -> Resume:
        """The state of one stage of this work, in a file beside this one."""
        kept = {"every_s": self.every_s, "writes": self.writes, **changes}
        file = None if self.file is None else self.file.with_name(f"{name}{SUFFIX}")
        return Resume(file, self.asked, self.what, self.restart, **kept)

    def other(self, name: str, more: Mapping[str, Any]) -> Resume:
        """The state of one part of this work, which depends on `more` too. That of another part is dropped."""
        file = None if self.file is None else self.file.with_name(f"{name}{SUFFIX}")
        kept = {"every_s": SAVE_SECONDS, "writes": self.writes}
        return Resume(file, {**self.asked, **more}, self.what, True, **kept)

    def _remove_temporaries(self) -> None:
        """Remove the temporary files of a save that was killed."""
        if self.file is not None and self.writes:
            sweep(self.file.parent, {self.file.name}.__contains__)


NOT_KEPT = Resume(None, {}, "")  # for work that keeps no state


@dataclass(frozen=True)
class Journal:
    """Records of many independent measurements: what was asked, in a JSON file, and beside it one line a record.

    The first process appends to `STEM.jsonl`, each of the others to its own `STEM-RANK.jsonl`. Messages name the work
    by `what`, and say by `remedy` what to do with the records of other work.
    """

    asked_file: Path
    stem: str
    what: str
    remedy: str
    rank: int = 0

    def holds(self, asked: Mapping[str, Any], upgraded: Callable[[Any], Any] = lambda found: found) -> bool:
        """Whether the journal of this work has been started. UserError if the records are of other work.

        `upgraded` turns what an earlier version recorded as asked into what this one would record.
        """
        if not self.asked_file.exists():
            if self.files():
                raise UserError(f"{self.files()[0]} has no {self.asked_file.name} beside it; {self.remedy}")
            return False
        found = read_json(self.asked_file)
        if not isinstance(found, dict):
            raise UserError(f"{self.asked_file} must hold an object; {self.remedy}")
        _refuse(self.asked_file.parent, self.what, upgraded(found), asked, self.remedy)
        return True

    def start(self, asked: Mapping[str, Any]) -> None:
        """Start an empty journal; old records are removed."""
        for file in self.files():
            file.unlink()
        write_json(self.asked_file, dict(asked))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is on disk when this returns."""
        name = f"{self.stem}-{self.rank}.jsonl" if self.rank else f"{self.stem}.jsonl"
        append_jsonl(self.asked_file.with_name(name), dict(record))

    def records(self) -> Iterator[tuple[str, int, Any]]:
        """Yield (place in words, line number from 0, record) for the records of all processes."""
        for file in self.files():
            for line, record in enumerate(read_jsonl(file)):
                yield f"{file}, line {line + 1}", line, record

    def files(self) -> list[Path]:
        """The record files of all processes."""
        own = re.compile(rf"{re.escape(self.stem)}(-\d+)?\.jsonl")  # others may have names that begin like it
        folder = self.asked_file.parent
        return sorted(file for file in folder.glob("*.jsonl") if own.fullmatch(file.name))


def _encoded(value: Any) -> Any:
    """The state with numpy arrays as tensors: torch's reader of plain data refuses arrays."""
    import torch

    if isinstance(value, np.ndarray):
        return {ARRAY: torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_encoded(item) for item in value) if type(value) in (list, tuple) else list(value)
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {ARRAY}:
            return _array(value[ARRAY])
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(item) for item in value)
    return value


def _array(stored: Any) -> np.ndarray:
    try:
        return stored.detach().numpy()
    except (AttributeError, TypeError, RuntimeError) as error:  # not a tensor, or of a type that numpy does not know
        raise UserError(f"it holds a {type(stored).__name__} for an array") from error
