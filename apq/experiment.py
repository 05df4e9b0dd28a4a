"""The folder of one experiment: settings, result, weights. It changes as a whole, and is read as a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from apq.errors import UserError
from apq.files import check_writable, read_json
from apq.lock import Lock, identity, locked, real
from apq.manifest import EXPORTED, Contents, add, contents_of, is_journal_of, listed_files, seal
from apq.names import plain_name
from apq.space import SearchSpace
from apq.staging import carry_over, link_into, put_in_place, remove, restore, stage, staged, unlink
from apq.subnet import Subnet, subnet_from_spec

MOST_NAMED = 3  # files that a message names
READS, PAUSE_S = 50, 0.02  # of an experiment that is replaced meanwhile

T = TypeVar("T")


@dataclass(frozen=True)
class Experiment:
    """The files of an experiment in a folder such as `exps/NAME`. `apq.search_result` reads and writes them.

    Files:
        arch: a subnet of the searched space, as a list of two objects: architecture, then policy.
        policy.json, model.pt: the policy and the float network of a search of bits, which has no `arch`.
        config.json, history.jsonl, made_by.json: settings and figures, one record a step, provenance.
        lat: the cost, as a list of one number.
        front.json: the points of a front, of searches for many budgets.
        acc, checkpoint/model_best.pth.tar: validation top-1 and weights, of a finetune.

    Methods name further files of their own.
    """

    path: Path

    @property
    def arch(self) -> Path:
        return self.path / "arch"

    @property
    def policy(self) -> Path:
        return self.path / "policy.json"

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    @property
    def lat(self) -> Path:
        return self.path / "lat"

    @property
    def acc(self) -> Path:
        return self.path / "acc"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def front(self) -> Path:
        return self.path / "front.json"

    @property
    def made_by(self) -> Path:
        return self.path / "made_by.json"

    @property
    def best_checkpoint(self) -> Path:
        return self.path / "checkpoint" / "model_best.pth.tar"

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoint" / "checkpoint.pth.tar"

    def drop_exported(self) -> None:
        """Remove the files of export.py, because the network changes."""
        for name in EXPORTED.values():
            (self.path / name).unlink(missing_ok=True)

    def unfinished(self) -> bool:
        """Whether there is the state of an unfinished search."""
        return any(self.path.glob("*.state.*"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        """Hold the experiment's lock, and remove what killed runs left. UserError names another holder.

        Every run that writes an experiment does so in such a block.
        """
        if real(self.path) in (here := real(Path.cwd()), *here.parents):  # before anything is written beside it
            raise UserError(f"{self.path} holds the working folder: run this from outside it")
        with locked(self.path) as lock:
            if lock.seen is None:
                _clear(lock)
                lock.seen = self._choice()
            yield lock

    def check_free(self, overwrite: bool, *, continues: str | None = None) -> None:
        """Check that the experiment can be written, before any work.

        UserError if it exists and may not be replaced, if the folder holds what no run wrote, or cannot be written.
        `continues` is the stem of a journal that may be there, because the run continues it.
        """
        contents = self.check_own(guests=False)
        if overwrite:
            return
        if self.arch.exists() or self.policy.exists():
            raise UserError(f"experiment {self.path} exists; choose another --exp_name or give --overwrite")
        journals = sorted(name for name in contents.unfinished if name.endswith((".json", ".jsonl")))
        if journals := [name for name in journals if continues is None or not is_journal_of(name, continues)]:
            raise UserError(f"{self.path} has {journals[0]}; choose another --exp_name or give --overwrite")

    def check_own(self, *, guests: bool) -> Contents:
        """Check that the folder can be replaced as a whole. Returns its contents.

        UserError if it cannot be renamed, if files of others have names that a run gives or, without `guests`, if it
        holds any files of others.
        """
        folder = real(self.path)
        check_writable(folder)
        try:
            check_writable(folder.parent)
        except UserError as error:
            raise UserError(
                f"{error}; an experiment is replaced by a rename, so give a folder in {self.path}"
            ) from error
        if os.path.ismount(folder):
            raise UserError(f"{self.path} is where a disk is mounted: give a folder in it")
        contents = contents_of(folder)
        if foreign := sorted(contents.in_the_way if guests else contents.of_users | contents.in_the_way):
            more = f" and {len(foreign) - MOST_NAMED} more" if len(foreign) > MOST_NAMED else ""
            raise UserError(
                f"{self.path} holds {', '.join(foreign[:MOST_NAMED])}{more}, which no run wrote there: move that away"
                + ("" if guests else ", or choose another --exp_name")
            )
        return contents

    @contextlib.contextmanager
    def replaced(self, *, more: bool = False) -> Iterator[Experiment]:
        """Yield an empty experiment to fill. If the block succeeds, it takes the place of this one by a rename.

        At any instant one of the two is there, whole. States of unfinished work go with the old one, so that a killed
        run can continue until then. Files of others, which may have come during the run, are moved into the new one.
        UserError, before anything has changed, if they have names that a run gives. With `more` the run goes on after
        it: killed then, it is not finished.
        """
        with self._rewritten(keeps=False, more=more) as new:
            yield new

    @contextlib.contextmanager
    def edited(self, *, more: bool = False) -> Iterator[Experiment]:
        """As `replaced`, but the experiment to fill has the files of this one. Write them anew, not in place."""
        with self._rewritten(keeps=True, more=more) as new:
            yield new

    @contextlib.contextmanager
    def _rewritten(self, *, keeps: bool, more: bool) -> Iterator[Experiment]:
        with self.locked() as lock:
            contents = self.check_own(guests=True)
            try:
                new = Experiment(stage(lock.folder))
            except OSError as error:
                raise UserError(f"cannot write beside {self.path}: {error.strerror or error}") from error
            try:
                if keeps:
                    link_into(new.path, lock.folder, contents.finished | contents.unfinished)
                yield new
                seal(new.path)
                self.check_own(guests=True)
                if self._choice() != lock.seen:
                    raise UserError(
                        f"{self.path} was changed by something else while this run worked; nothing was written"
                    )
                lock.publishing(lock.folder, more=more)
                old = put_in_place(new.path, lock.folder)
            except OSError as error:
                shutil.rmtree(new.path, ignore_errors=True)
                raise UserError(f"cannot replace {self.path}: {error.strerror or error}") from error
            except BaseException:
                if not lock.published:
                    shutil.rmtree(new.path, ignore_errors=True)
                raise
            lock.seen = self._choice()
            if old is not None:
                _retire(old, lock.folder)

    @contextlib.contextmanager
    def adding(self, name: str, of: list[int] | None = None) -> Iterator[Path]:
        """Yield the path of a file to add, or to replace if it is the experiment's own. UserError if it is not.

        With `of`, the `identity` of the folder when it was read: UserError if it has been replaced since.
        """
        with self.locked() as lock:
            if of is not None and identity(lock.folder) != of:
                raise UserError(f"{self.path} was replaced while this run worked; nothing was written")
            if name not in listed_files(lock.folder):
                if os.path.lexists(lock.folder / name):
                    raise UserError(f"{self.path / name} exists, and no run wrote it: move it away")
                add(lock.folder, name)  # first: a file that is not listed would be in the way for ever
            yield self.path / name

    def whole(self, read: Callable[[], T]) -> T:
        """What `read` returns or raises, read again if the experiment was replaced meanwhile: all of one run."""
        for _ in range(READS):
            before = identity(self.path)
            try:
                found: Any = read()
            except UserError as error:
                found = error
            if identity(self.path) == before:
                break
            time.sleep(PAUSE_S)
        else:
            raise UserError(f"{self.path} is replaced again and again: try later")
        if isinstance(found, UserError):
            raise found
        return found

    def _choice(self) -> list[Any]:
        """What tells this result from another one in the same folder."""
        return [identity(path) for path in (self.arch, self.policy)]

    def load_subnet(self, space: SearchSpace) -> Subnet:
        """The subnet of the `arch` file. UserError where the file is missing, or does not fit the space."""
        if not self.arch.exists():
            raise UserError(f"no experiment at {self.path}: it has no arch file; run search.py first")
        parts = read_json(self.arch)
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, dict) for part in parts)):
            raise UserError(f"{self.arch} must hold a list of two objects, architecture then policy")
        if twice := set(parts[0]) & set(parts[1]):
            raise UserError(f"{self.arch} has {', '.join(sorted(twice))} in both objects")
        try:
            return subnet_from_spec(space, {**parts[0], **parts[1]})
        except UserError as error:
            raise UserError(f"{self.arch}: {error}") from error


def _clear(lock: Lock) -> None:
    """Remove what killed runs left in and beside the folder of an experiment."""
    restore(lock.folder)
    for left in staged(lock.folder):
        if identity(left) == lock.replaced:  # the old experiment: nothing of others may go with it
            _retire(left, lock.folder)
        else:
            shutil.rmtree(left, ignore_errors=True)
    lock.cleared()
    contents = contents_of(lock.folder)
    if not contents.foreign:  # else the folder may be of others altogether
        unlink(lock.folder, contents.leftover)


def _retire(old: Path, folder: Path) -> None:
    """Remove the old experiment after another one is in its place. Files of others move there."""
    contents = contents_of(old)
    carry_over(old, folder, contents.foreign)
    remove(old, contents.own)


def get_experiment(name: str, folder: Path | None = None) -> Experiment:
    """The experiment in `folder`, or else in exps/NAME. UserError where the name is a path."""
    if folder is not None:
        return Experiment(folder)
    try:
        return Experiment(Path("exps") / plain_name(name, "--exp_name"))
    except UserError as error:
        raise UserError(f"{error}; give a path with --exp_dir") from error
