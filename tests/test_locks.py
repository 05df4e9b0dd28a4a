"""One run at a time writes a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from apq.errors import UserError
from apq.experiment import Experiment
from apq.lock import InUseError, lock_file, locked
from apq.model_folder import ModelFolder
from dataset.pairs import PairStore

HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from apq.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "exps/a"`."""
    code = HOLD.format(root=str(ROOT))
    command = [sys.executable, "-c", code, str(tmp_path / "exps/a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_told_whose_the_folder_is(tmp_path, holder):
    for lock in (Experiment(tmp_path / "exps/a").locked, ModelFolder(tmp_path / "exps/a").locked):
        with pytest.raises(InUseError, match=rf"exps/a is in use by process {holder.pid} \(-c "), lock():
            pass
    with pytest.raises(UserError, match="is in use"), PairStore(tmp_path / "exps/a").locked():
        pass
    (tmp_path / "link").symlink_to(tmp_path / "exps")  # it is the same folder
    with pytest.raises(InUseError), locked(tmp_path / "link/a"):
        pass
    with locked(tmp_path / "exps/b"):
        pass


def test_the_lock_of_a_killed_run_is_no_obstacle(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_file(tmp_path / "exps/a").exists()
    with locked(tmp_path / "exps/a") as lock:
        assert not lock.finished
        assert json.loads(lock_file(tmp_path / "exps/a").read_text().splitlines()[0])["pid"] == os.getpid()
    assert list((tmp_path / "exps").iterdir()) == []


def test_a_lock_leaves_nothing_and_shares_itself(tmp_path):
    with locked(tmp_path / "new/folder/a") as lock, locked(tmp_path / "new/folder/../folder/a") as again:
        assert lock is again
        assert [path.name for path in (tmp_path / "new/folder").iterdir()] == [".a.lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_others_is_no_lock(tmp_path):
    (tmp_path / ".a.lock").write_text("mine")
    with pytest.raises(UserError, match="is not a lock of this program"), locked(tmp_path / "a"):
        pass
    assert (tmp_path / ".a.lock").read_text() == "mine"


def test_worker_processes_do_not_keep_a_lock(tmp_path):
    """A loader's workers outlive a killed run for seconds."""
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        with locked(tmp_path / "a"):
            if not os.fork():
                time.sleep(30)
                os._exit(0)
            os.write(writing, b"held")
            time.sleep(30)
        os._exit(0)
    os.read(reading, 4)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with locked(tmp_path / "a"):
        pass
