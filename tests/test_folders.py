"""Who writes a folder: experiments remove their own files alone, one run at a time writes, left-overs are swept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script
from example_results import found
from example_spaces import TINY

from apq.checkpoint import save_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, write_json
from apq.genes import largest_subnet
from apq.leftovers import sweep, sweep_cache
from apq.lock import InUseError, lock_file, locked
from apq.manifest import contents_of, listed_files
from apq.model_folder import ModelFolder
from apq.presets import DIGITS
from apq.resume import Journal, Resume
from apq.search_result import read_result
from apq.space import space_to_dict
from dataset.pairs import PairStore
from elastic_nn.training import supernet_training

RESULT = found(DIGITS, largest_subnet(DIGITS))
SEARCH = ["--constraint", "0.05", "--generations", "1", "--population", "20"]
analyse = script("report/analyse")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder):
    with Experiment(folder).replaced() as new:
        RESULT.write(new)
    return Experiment(folder)


# ---- an experiment removes only what it wrote ----


def state(path):
    Resume(path, {"seed": 0}, "search").save({"a": 1})


FOREIGN = {
    "a folder of models": ("model.pt", "training.json"),
    "a training in a folder of models": (lambda folder: state(folder / "model.state.pt"),),
    "a checkpoint": ("checkpoint/epoch-3.pt",),
    "a checkpoint of the published name": ("checkpoint/model_best.pth.tar", "checkpoint/checkpoint.pth.tar"),
    "an accuracy": ("acc",),
    "a front": ("front.json",),
    "what looks staged": (".new/weights",),
    "a project": ("main.py", "config.json", "data/x.csv"),
    "a project that lists its files": (lambda folder: write_json(folder / "config.json", {"files": ["a"]}), "a"),
    "weights called a state": (lambda folder: torch.save({"net.weight": torch.ones(2)}, folder / "net.state.pt"),),
    "lines": ("evaluated.jsonl",),
    "records": (lambda folder: write_json(folder / "evaluated.json", {"mine": 1}), "evaluated.jsonl"),
    "a hidden file": (".config.json.original",),
}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_of_others_is_refused_before_any_work(tmp_path, monkeypatch, what, overwrite):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for item in FOREIGN[what]:
        if callable(item):
            item(folder)
        else:
            (folder / item).parent.mkdir(exist_ok=True)
            (folder / item).write_text("mine")
    before = files_of(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"holds .*which no run wrote there"):
        script("search")([*SEARCH, "--exp_dir", "theirs", *overwrite])
    (tmp_path / "models").unlink()
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["notes", "checkpoint/mine.pt", "plots/a.png", ".DS_Store"])
def test_what_others_put_into_an_experiment_stays(tmp_path, name):
    """Also what came while a run worked: finished work is not refused for it."""
    experiment = fill(tmp_path / "a")
    (experiment.path / name).parent.mkdir(exist_ok=True)
    (experiment.path / name).write_text("mine")
    number = (experiment.path / name).stat().st_ino
    for rewritten in (experiment.replaced, experiment.edited):
        with rewritten() as new:
            RESULT.write(new)
            (experiment.path / "late").write_text("mine")
        assert (experiment.path / name).read_text() == (experiment.path / "late").read_text() == "mine"
        assert (experiment.path / name).stat().st_ino == number  # the file itself, not a copy
        assert read_result(experiment).cost == RESULT.cost
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_new_folders_with_files_of_systems_are_used(tmp_path):
    for name in (".gitkeep", ".DS_Store", "._front.json"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("")
    Experiment(tmp_path / "a").check_free(overwrite=False)
    fill(tmp_path / "a")
    assert {".gitkeep", ".DS_Store", "._front.json", "arch"} <= {path.name for path in (tmp_path / "a").iterdir()}


@pytest.mark.parametrize("name", ["front.json", "net.state.pt", "acc"])
def test_names_of_ours_are_not_for_others(tmp_path, name):
    experiment = fill(tmp_path / "a")
    (experiment.path / name).parent.mkdir(exist_ok=True)
    if name == "net.state.pt":
        torch.save({"net.weight": torch.ones(2)}, experiment.path / name)
    else:
        (experiment.path / name).write_text("mine")
    before = files_of(tmp_path)
    for rewritten in (experiment.replaced, experiment.edited):
        refused = pytest.raises(UserError, match=f"holds {name.partition('/')[0]}.*, which no run wrote there")
        with refused, rewritten() as new:
            RESULT.write(new)
        assert files_of(tmp_path) == before


def test_the_list_of_files_covers_what_later_commands_add(tmp_path):
    experiment = fill(tmp_path / "a")
    with experiment.edited() as new:  # as a finetune does
        write_json(new.acc, [0.5])
        save_checkpoint(new.best_checkpoint, {"w": torch.ones(1)})
    with experiment.adding("bits.png") as picture:  # as test.py does
        picture.write_text("drawn")
    with experiment.edited() as new:  # as a pick does
        RESULT.write(new)
    assert set(read_json(experiment.config)["files"]) == set(files_of(experiment.path))
    assert {"acc", "checkpoint/model_best.pth.tar", "bits.png"} <= listed_files(experiment.path)
    fill(experiment.path)
    assert set(files_of(experiment.path)) == {"arch", "config.json", "history.jsonl", "lat", "made_by.json"}
    (experiment.path / "bits.png").write_text("mine")
    with pytest.raises(UserError, match=r"bits\.png exists, and no run wrote it"), experiment.adding("bits.png"):
        pass
    assert (experiment.path / "bits.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["oqa-4bit", "oqa-2bit"])
def test_experiments_of_before_can_be_replaced_and_finetuned(tmp_path, name):
    shutil.copytree(ROOT / "exps" / name, tmp_path / name)
    experiment = Experiment(tmp_path / name)
    before = read_result(experiment)
    assert not contents_of(experiment.path).foreign
    with experiment.edited() as new:
        write_json(new.acc, [0.5])
    assert read_result(experiment) == before
    assert set(read_json(experiment.config)["files"]) == set(files_of(experiment.path))
    fill(experiment.path)
    assert set(files_of(experiment.path)) == {"arch", "config.json", "history.jsonl", "lat", "made_by.json"}


def test_a_published_experiment_can_be_replaced(tmp_path):
    write_json(tmp_path / "a/arch", [{}, {}])
    write_json(tmp_path / "a/acc", [0.7])
    (tmp_path / "a/checkpoint").mkdir()
    (tmp_path / "a/checkpoint/model_best.pth.tar").write_bytes(b"weights")
    with pytest.raises(UserError, match="give --overwrite"):
        Experiment(tmp_path / "a").check_free(overwrite=False)
    fill(tmp_path / "a")
    assert not (tmp_path / "a/checkpoint").exists()


def test_a_picture_of_others_is_not_drawn_over(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.png").write_bytes(b"\x89PNG of mine")
    words = ["diagram", "exps/oqa-4bit", "--out"]
    with pytest.raises(UserError, match="exists; choose another --out or give --overwrite"):
        analyse([*words, str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_bytes() == b"\x89PNG of mine"
    for more in ([], ["--overwrite"]):
        analyse([*words, str(tmp_path / "drawn.png"), *more])


def test_a_training_record_of_others_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "mine/training.json", {"epochs": 3})
    for words in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"training\.json exists, and no training wrote it"):
            script("train")(["--recipe", "tiny", "--out", "mine", *words])
    assert read_json(tmp_path / "mine/training.json") == {"epochs": 3}


def test_a_journal_leaves_lines_whose_names_begin_like_its_own(tmp_path):
    (tmp_path / "pairs-of-mine.jsonl").write_text("mine")
    journal = Journal(tmp_path / "meta.json", "pairs", "gathering", "remove it")
    journal.start({"seed": 0})
    journal.append({"index": 0})
    journal.start({"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "pairs-of-mine.jsonl"]


# ---- one run at a time ----

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


# ---- what kills leave ----


def test_temporaries_are_told_from_files_of_others(tmp_path):
    own = ["config.json", "arch"].__contains__
    swept = [".config.json.x1y2z3_4", ".arch.abcdefg7"]
    kept = [".config.json.original", ".config.json.20240131", ".config.json.bak", ".notes.x1y2z3_4", "config.json"]
    for name in (*swept, *kept, ".arch.private_"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".arch.private_").chmod(0o600)  # as `tempfile` makes them
    (tmp_path / ".arch.f0lderxx").mkdir()
    sweep(tmp_path, own)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".arch.f0lderxx"])


def test_caches_are_swept_of_what_is_old(tmp_path):
    for name, age in ((".a.npz.x1y2z3_4", 2 * 24 * 3600), (".b.npz.x1y2z3_4", 0)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep_cache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".b.npz.x1y2z3_4"]  # another process may be writing it


def test_the_next_run_sweeps_what_kills_left(tmp_path):
    experiment = fill(tmp_path / "exps/a")
    before = files_of(experiment.path)
    for name in (
        ".search.state.pt.x1y2z3_4",
        ".config.json.x1y2z3_4",
        ".new/arch",
        ".new/checkpoint/model_best.pth.tar",
    ):
        (experiment.path / name).parent.mkdir(parents=True, exist_ok=True)
        (experiment.path / name).write_text("half")
    (tmp_path / "exps/.a.new-0123abcd").mkdir()
    (tmp_path / "exps/.a.new-0123abcd/arch").write_text("half")
    others = ["b", ".b.new-0123abcd", ".a.new-mine", ".a.notes"]
    for name in others:
        (tmp_path / "exps" / name).mkdir()
    with experiment.locked():
        pass
    assert files_of(experiment.path) == before
    assert sorted(path.name for path in (tmp_path / "exps").iterdir()) == sorted([*others, "a"])
    for name in ("supernet.pt", "supernet.state.pt", "acc.pt", "model.pt", "training.json"):
        (tmp_path / f".{name}.x1y2z3_4").write_text("half")
    with ModelFolder(tmp_path).locked():
        assert [path.name for path in tmp_path.iterdir()] == ["exps"]


def test_a_killed_run_that_had_finished_says_so(tmp_path):
    """The same command ends well. Another one finds a finished experiment."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    code = (
        "import os, runpy, sys; from apq import experiment;"
        "experiment.remove = lambda *args: os._exit(137);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [str(ROOT / "search.py"), *SEARCH, "--exp_name", "a"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def call(*before):
        command = [sys.executable, *before, *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    state(tmp_path / "exps/a/other.state.pt")  # so that there is a folder to replace
    assert call("-c", code).returncode == 137
    whole = files_of(tmp_path / "exps/a")
    again = call()
    assert (again.returncode, again.stderr) == (0, "")
    assert "exps/a is finished" in again.stdout
    assert files_of(tmp_path / "exps/a") == whole
    assert [path.name for path in (tmp_path / "exps").iterdir()] == ["a"]
    later = call()
    assert later.returncode == 2
    assert "experiment exps/a exists" in later.stderr


def test_a_killed_training_that_had_finished_says_so(tmp_path, monkeypatch, capsys):
    train = script("train")
    monkeypatch.chdir(tmp_path)
    words = ["--model", "mobilenet_v1_small", "--images", "digits", "--recipe", "tiny", "--epochs", "1", "--out", "m"]

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "done", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(words)
    assert sorted(path.name for path in Path("m").iterdir()) == ["model.pt", "model.state.pt"]
    capsys.readouterr()
    train([*words, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["val_top1"] == torch.load("m/model.pt", weights_only=True)["val_top1"]
    assert [path.name for path in Path("m").iterdir()] == ["model.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_the_record_of_a_killed_training_is_that_of_its_supernet(tmp_path, monkeypatch, capsys):
    train = script("train")
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "tiny.json", space_to_dict(replace(TINY, name="tiny")))
    words = ["--space", "tiny.json", "--recipe", "tiny", "--out", "m", "--overwrite"]
    train([*words, "--seed", "1"])

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(supernet_training, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            train(words)
    assert read_json(Path("m/training.json"))["seed"] == 1
    train(words)  # says that it is finished
    made = torch.load("m/supernet.pt", weights_only=True)
    record = read_json(Path("m/training.json"))
    assert (record["seed"], record["phases"]) == (made["seed"], made["records"]) == (0, record["phases"])
