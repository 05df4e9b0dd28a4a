"""The folder of one experiment: settings, result, weights. Every write is atomic."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apq.errors import UserError
from apq.files import check_writable, read_json, write_json
from apq.names import plain_name
from apq.space import SearchSpace
from apq.subnet import Subnet, subnet_from_spec

FILES_OF_FORMAT_1 = ("front.json", "front.png", "history.png", "bits.png", "model.pt")  # made_by.json lists later ones
PICTURES = ("depths.png", "shapes.png", "diagram.png")  # of `python -m report.analyse`


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

    def unfinished(self) -> bool:
        """Whether there is the state of an unfinished search."""
        return any(self.path.glob("*.state.*"))

    def check_free(self, overwrite: bool) -> None:
        """Check that the experiment can be written, before any work.

        UserError if it exists and may not be replaced, or if the folder cannot be written.
        """
        check_writable(self.path)
        if overwrite:
            return
        if self.arch.exists() or self.policy.exists():
            raise UserError(f"experiment {self.path} exists; choose another --exp_name or give --overwrite")
        if journals := self._journals():
            raise UserError(f"{self.path} has {journals[0].name}; choose another --exp_name or give --overwrite")

    @contextlib.contextmanager
    def replaced(self) -> Iterator[Experiment]:
        """Yield an empty experiment to fill. If the block succeeds, its files replace those of this experiment.

        `arch` and `policy.json`, which mark an experiment as finished, are removed first and written last. States of
        unfinished work are removed after that, so that a killed run can continue until then. Files that no search
        wrote stay.
        """
        new = Experiment(self.path / ".new")
        shutil.rmtree(new.path, ignore_errors=True)
        yield new
        written = {item.name for item in new.path.iterdir()}
        files = {item.name for item in new.path.iterdir() if item.is_file()} | {new.made_by.name}
        stale = {*self._files_of_search()} - written
        made_by = read_json(new.made_by) if new.made_by.exists() else {}
        # Until all is in place, both results own their files: after a kill the next search removes what this one left.
        write_json(self.made_by, {**made_by, "files": sorted(files | stale)})
        write_json(new.made_by, {**made_by, "files": sorted(files)})
        for item in (self.arch, self.policy, self.acc, *(self.path / name for name in stale)):
            item.unlink(missing_ok=True)
        shutil.rmtree(self.best_checkpoint.parent, ignore_errors=True)
        last = (new.made_by.name, new.arch.name, new.policy.name)
        for item in sorted(new.path.iterdir(), key=lambda item: item.name in last and 1 + last.index(item.name)):
            item.replace(self.path / item.name)
        for state in self.path.glob("*.state.*"):
            state.unlink()
        new.path.rmdir()

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

    def _files_of_search(self) -> list[str]:
        """Names of all files of the last search, its unfinished ones and its pictures included."""
        try:
            # Names alone: no path may leave the folder.
            listed = [Path(name).name for name in read_json(self.made_by)["files"]]
        except (UserError, KeyError, TypeError):
            listed = []
        return [*(listed or FILES_OF_FORMAT_1), *PICTURES, *(file.name for file in self._journals())]

    def _journals(self) -> list[Path]:
        """The files of each `apq.resume.Journal` in the folder: STEM.json, STEM.jsonl and STEM-RANK.jsonl."""
        found: set[Path] = set()
        for file in self.path.glob("*.jsonl"):
            asked = file.with_name(re.sub(r"(-\d+)?\.jsonl$", ".json", file.name))
            if asked.exists() and file != self.history:  # lines alone may be anybody's
                found |= {asked, file}
        return sorted(found)


def get_experiment(name: str, folder: Path | None = None) -> Experiment:
    """The experiment in `folder`, or else in exps/NAME. UserError where the name is a path."""
    if folder is not None:
        return Experiment(folder)
    try:
        return Experiment(Path("exps") / plain_name(name, "--exp_name"))
    except UserError as error:
        raise UserError(f"{error}; give a path with --exp_dir") from error
