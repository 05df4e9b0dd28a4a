"""What killed runs leave is swept by the next one, and finished work is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script
from example_results import files_of, found, replaced_by
from example_spaces import TINY

from apq.files import read_json, write_json
from apq.genes import largest_subnet
from apq.leftovers import sweep, sweep_cache
from apq.model_folder import ModelFolder
from apq.presets import DIGITS
from apq.resume import Resume
from apq.space import space_to_dict
from elastic_nn.training import supernet_training

RESULT = found(DIGITS, largest_subnet(DIGITS))
SEARCH = ["--constraint", "0.05", "--generations", "1", "--population", "20"]


def fill(folder):
    return replaced_by(RESULT, folder)


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

    # So that there is a folder to replace:
    Resume(tmp_path / "exps/a/other.state.pt", {"seed": 0}, "search").save({"a": 1})
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
