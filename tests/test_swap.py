"""An experiment changes as a whole: a kill at any step leaves the old or the new one, and the next run tidies up."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from example_results import files_of, found

from apq import staging
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, write_json
from apq.genes import largest_subnet
from apq.lock import locked
from apq.presets import DIGITS
from apq.search_result import read_result

OLD = found(DIGITS, largest_subnet(DIGITS), cost=1.0, settings={"n": 1}, front=({"a": 1},))
NEW = replace(OLD, cost=2.0, settings={"n": 2}, front=None)
KILLED = 77  # exit code
# All calls that change the disk. A kill just before each of them, and after the last, is a kill at every step.
CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "link", "fsync", "chmod", "pwrite", "write")


def in_fork(work) -> int:
    """Run `work` in a forked process. Returns its exit code: that of a kill, 0, or 1 after an exception."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, work, exchanges: bool):
    """`work` in which the process ends, as by a kill, before its `step`-th call that changes the disk."""
    done = 0

    def counted(call):
        def counting(*args, **kwargs):
            nonlocal done
            done += 1
            if done > step:
                os._exit(KILLED)
            return call(*args, **kwargs)

        return counting

    def killed():
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        staging.exchange = counted(staging.exchange) if exchanges else lambda one, other: False
        work()

    return killed


def put(folder: Path) -> None:
    """The old experiment, finetuned, with the state of an unfinished search."""
    experiment = Experiment(folder)
    with experiment.replaced() as new:
        OLD.write(new)
    with experiment.edited() as new:
        write_json(new.acc, [0.25])
        write_json(new.best_checkpoint, ["weights"])
    (folder / "search.state.pt").write_bytes(b"")
    (folder / "notes").write_text("mine")


def without_dates(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in ("made_by.json", "search.state.pt", "notes")}


def replaced(folder: Path) -> None:
    with Experiment(folder).locked(), Experiment(folder).replaced() as new:
        NEW.write(new)


def finetuned(folder: Path) -> None:
    with Experiment(folder).locked(), Experiment(folder).edited() as new:
        write_json(new.best_checkpoint, ["better"])
        write_json(new.acc, [0.5])


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("work", [replaced, finetuned])
def test_a_kill_at_every_step_leaves_the_old_or_the_new_experiment_whole(tmp_path, work, exchanges):
    folder = tmp_path / "exps/a"
    put(tmp_path / "old/a")
    before = files_of(tmp_path / "old/a")
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    work(tmp_path / "whole/a")
    after = without_dates(files_of(tmp_path / "whole/a"))
    seen = set()
    for step in range(1000):
        shutil.rmtree(tmp_path / "exps", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "exps")
        code = in_fork(killed_at(step, lambda: work(folder), exchanges))
        if exchanges or folder.exists():  # without an exchange there is an instant between two renames
            left = without_dates(files_of(folder))
            seen.add(left == after)
            assert left in (without_dates(before), after), step
        with Experiment(folder).locked() as lock:  # what the next run does first
            assert lock.finished == (code == KILLED and without_dates(files_of(folder)) == after), step
        assert [path.name for path in (tmp_path / "exps").iterdir()] == ["a"], step  # nothing is left
        assert (folder / "notes").read_text() == "mine", step
        left = without_dates(files_of(folder))
        assert left in (without_dates(before), after), step
        assert ("search.state.pt" in files_of(folder)) or left == after  # until then the search can continue
        if code == 0:
            break
        assert code == KILLED
    assert code == 0
    assert step > 20
    assert seen == {True, False}


@pytest.mark.parametrize("call", ["mkdir", "link", "fsync", "rename", "replace"])
def test_what_fails_leaves_the_old_experiment_and_one_line(tmp_path, monkeypatch, call):
    """A full disk or missing permissions, at the first such call."""
    folder = tmp_path / "exps/a"
    put(folder)
    before, real = files_of(folder), getattr(os, call)

    def fails(*args, **kwargs):
        if ".a.new-" in f"{args}" or call == "fsync":
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fails)
    monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    work = finetuned if call == "link" else replaced
    if call == "link":  # a file system without hard links: files are copied
        finetuned(folder)
    else:
        with pytest.raises(UserError, match="No space left on device"):
            work(folder)
        assert files_of(folder) == before
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "exps").iterdir()] == ["a"]


def test_an_exception_in_the_block_changes_nothing(tmp_path):
    put(tmp_path / "exps/a")
    before = files_of(tmp_path / "exps/a")
    for raised in (RuntimeError, KeyboardInterrupt):
        with contextlib.suppress(raised), Experiment(tmp_path / "exps/a").replaced() as new:
            NEW.write(new)
            raise raised
        assert files_of(tmp_path / "exps/a") == before
        assert [path.name for path in (tmp_path / "exps").iterdir()] == ["a"]


@pytest.mark.parametrize("link", ["exps", "exps/a"])
def test_a_linked_folder_is_replaced_where_it_is(tmp_path, link):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(disk if link == "exps" else disk / "of a")
    for n, result in ((1, OLD), (2, NEW)):
        with Experiment(tmp_path / "exps/a").replaced() as new:
            result.write(new)
        assert read_result(Experiment(tmp_path / "exps/a")).settings == {"n": n}
    assert (tmp_path / link).is_symlink()
    assert [path.name for path in disk.iterdir()] == ["a" if link == "exps" else "of a"]


def test_links_are_not_followed_out(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "model_best.pth.tar").write_text("mine")
    (precious / "weights").write_text("mine")
    put(tmp_path / "exps/a")
    (tmp_path / "exps/a/lat").unlink()
    (tmp_path / "exps/a/lat").symlink_to(precious / "weights")  # a file of the experiment, moved to another disk
    replaced(tmp_path / "exps/a")
    put(tmp_path / "exps/b")
    shutil.rmtree(tmp_path / "exps/b/checkpoint")
    (tmp_path / "exps/b/checkpoint").symlink_to(precious)
    with pytest.raises(UserError, match="holds checkpoint, which no run wrote"):
        replaced(tmp_path / "exps/b")
    assert {path.name: path.read_text() for path in precious.iterdir()} == {
        "model_best.pth.tar": "mine",
        "weights": "mine",
    }


def test_the_second_check_sees_what_came_meanwhile(tmp_path):
    put(tmp_path / "exps/a")

    def comes_in(name: str) -> None:
        with Experiment(tmp_path / "exps/a").replaced() as new:
            NEW.write(new)
            if name == "arch":  # a run of a program without locks
                OLD.write(Experiment(tmp_path / "exps/a"))
            else:
                (tmp_path / "exps/a" / name).write_text("mine")

    for name, words in (
        ("evaluated.jsonl", "holds evaluated.jsonl, which no run"),
        ("arch", "was changed by something"),
    ):
        with pytest.raises(UserError, match=words):
            comes_in(name)
        assert read_result(Experiment(tmp_path / "exps/a")).settings == {"n": 1}
        (tmp_path / "exps/a/evaluated.jsonl").unlink(missing_ok=True)


def test_readers_get_one_experiment_whole(tmp_path, monkeypatch):
    """The experiment is replaced between two reads of a reader."""
    put(tmp_path / "exps/a")
    experiment, reads = Experiment(tmp_path / "exps/a"), []

    def read():
        first = read_json(experiment.lat)
        if not reads:
            replaced(experiment.path)
        reads.append(first)
        return first, read_json(experiment.config)["n"]

    assert experiment.whole(read) == ([2.0], 2)
    assert reads == [[1.0], [2.0]]


def test_a_folder_that_cannot_be_renamed_is_refused_at_once(tmp_path, monkeypatch):
    put(tmp_path / "exps/a")
    monkeypatch.chdir(tmp_path / "exps/a")
    for folder in (".", "..", tmp_path / "exps/a"):
        with pytest.raises(UserError, match="holds"):
            Experiment(Path(folder)).check_free(overwrite=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UserError, match="where a disk is mounted"):
        Experiment(tmp_path / "exps/a").check_free(overwrite=True)


def test_a_lock_has_its_folder_for_itself(tmp_path):
    """Staged folders of another run are not swept while that run lives."""
    put(tmp_path / "exps/a")
    with locked(tmp_path / "exps/a"):
        assert in_fork(lambda: replaced(tmp_path / "exps/a")) == 1
    assert in_fork(lambda: replaced(tmp_path / "exps/a")) == 0
