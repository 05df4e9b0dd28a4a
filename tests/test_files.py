"""Files are whole or absent. Damaged ones are one-line errors."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from example_results import found, write_found

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import append_jsonl, atomic_open, check_writable, read_arrays, read_json, read_jsonl, write_json
from apq.genes import largest_subnet
from apq.presets import DIGITS, get_space
from apq.search_result import read_result
from apq.space import space_to_dict


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, [1])

    def killed():
        with atomic_open(path) as file:
            file.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        killed()
    assert read_json(path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "f.jsonl"
    append_jsonl(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    torn = path.read_bytes()
    assert read_jsonl(path) == [{"a": 1}]
    assert path.read_bytes() == torn  # reading changes nothing
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


def test_what_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot write"):
            write_json(path, [1])
        with pytest.raises(UserError, match="cannot write"):
            append_jsonl(path, {})
    with pytest.raises(UserError, match="not a folder"):
        check_writable(tmp_path / "file" / "below")
    check_writable(tmp_path / "not" / "there" / "yet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.ones(3)})
    fdopen = os.fdopen

    def full(handle, mode):
        os.close(handle)
        return fdopen(os.open("/dev/full", os.O_RDWR), mode)

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(path, {"w": torch.zeros(1_000_000)})
    monkeypatch.undo()
    assert load_checkpoint(path)["w"].sum() == 3
    assert [item.name for item in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("content", ["", "{", "\x00\xff"])
def test_broken_json_is_a_user_error(tmp_path, content):
    (tmp_path / "f").write_text(content)
    with pytest.raises(UserError):
        read_json(tmp_path / "f")
    with pytest.raises(UserError):
        read_json(tmp_path / "absent")


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_checkpoints_that_are_not_data_are_refused(tmp_path, capsys):
    good = tmp_path / "good.pt"
    save_checkpoint(good, {"w": torch.ones(1000), "name": "x"})
    assert load_checkpoint(good, ("w",))["name"] == "x"

    evil, plain, short, text = (tmp_path / n for n in ("evil.pt", "plain.pt", "short.pt", "text.pt"))
    torch.save({"w": _Evil()}, evil)
    plain.write_bytes(pickle.dumps(_Evil()))
    short.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    text.write_text("not a checkpoint")
    for path in (evil, plain, short, text, tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UserError, match=path.name):
            load_checkpoint(path)
    with pytest.raises(UserError, match="lacks optimizer"):
        load_checkpoint(good, ("optimizer",))
    torch.save([1], text)
    with pytest.raises(UserError, match="list"):
        load_checkpoint(text)
    assert "code ran" not in capsys.readouterr().out


def test_experiment_round_trip_and_protection(tmp_path):
    experiment, subnet = Experiment(tmp_path / "e"), largest_subnet(DIGITS)
    experiment.check_free(overwrite=False)
    result = found(DIGITS, subnet, cost=1.5, settings={"seed": 0}, history=({"generation": 0},))
    result.write(experiment)
    assert experiment.load_subnet(DIGITS) == subnet
    assert json.loads(experiment.lat.read_text()) == [1.5]
    assert read_jsonl(experiment.history) == [{"generation": 0}]
    assert read_result(experiment) == result
    config = read_json(experiment.config)
    write_json(experiment.config, {key: value for key, value in config.items() if key != "acc_predictor_dir"})
    with pytest.raises(UserError, match="lacks acc_predictor_dir"):
        read_result(experiment)
    with pytest.raises(UserError, match="--overwrite"):
        experiment.check_free(overwrite=False)
    experiment.check_free(overwrite=True)


def test_an_experiment_is_replaced_only_by_a_whole_one(tmp_path):
    experiment, subnet = Experiment(tmp_path / "e"), largest_subnet(DIGITS)
    with experiment.replaced() as new:
        found(DIGITS, subnet, cost=1.0, settings={"n": 1}).write(new)

    def fails():
        with experiment.replaced() as new:
            found(DIGITS, subnet, cost=2.0, settings={"n": 2}).write(new)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert read_json(experiment.lat) == [1.0]
    with experiment.replaced() as new:
        found(DIGITS, subnet, cost=3.0, settings={"n": 3}).write(new)
    assert (read_json(experiment.lat), read_result(experiment).settings) == ([3.0], {"n": 3})
    assert sorted(item.name for item in experiment.path.iterdir()) == [
        "arch",
        "config.json",
        "history.jsonl",
        "lat",
        "made_by.json",
    ]


def test_a_search_that_wrote_weights_can_be_replaced(tmp_path):
    experiment, subnet = Experiment(tmp_path / "e"), largest_subnet(DIGITS)
    with experiment.replaced() as new:
        save_checkpoint(new.best_checkpoint, {"w": torch.ones(3)})
        write_json(new.acc, [0.5])
        found(DIGITS, subnet).write(new)
    assert experiment.best_checkpoint.exists()
    with experiment.replaced() as new:
        found(DIGITS, subnet).write(new)
    assert not experiment.best_checkpoint.parent.exists()
    assert not experiment.acc.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a, p: [a], "two objects"),
        (lambda a, p: {"ks": 1}, "two objects"),
        (lambda a, p: [a, {**p, "ks": a["ks"]}], "both"),
        (lambda a, p: [{k: v for k, v in a.items() if k != "ks"}, p], "lacks ks"),
        (lambda a, p: [{**a, "color": 1}, p], "color"),
        (lambda a, p: [{**a, "ks": a["ks"][1:]}, p], "list of"),
        (lambda a, p: [{**a, "ks": [9, *a["ks"][1:]]}, p], "9"),
        (lambda a, p: [a, {**p, "dw_a_bits_setting": [5] * len(a["ks"])}], "5"),
    ],
)
def test_bad_arch_files_are_user_errors(tmp_path, change, match):
    experiment = write_found(tmp_path, DIGITS, largest_subnet(DIGITS))
    write_json(experiment.arch, change(*read_json(experiment.arch)))
    with pytest.raises(UserError, match=match):
        experiment.load_subnet(DIGITS)


def test_spaces_come_from_names_and_files(tmp_path):
    write_json(tmp_path / "s.json", space_to_dict(DIGITS))
    assert get_space(str(tmp_path / "s.json")) == DIGITS
    with pytest.raises(UserError, match="digits"):
        get_space("digit")
    write_json(tmp_path / "bad.json", {**space_to_dict(DIGITS), "kernel_sizes": [3, 4]})
    with pytest.raises(UserError, match="odd"):
        get_space(str(tmp_path / "bad.json"))


def test_damaged_arrays_are_user_errors(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(5))
    assert read_arrays(path)["a"].tolist() == [0, 1, 2, 3, 4]
    whole = path.read_bytes()
    unknown = whole.replace(b"\x00\x00\x00\x00!\x00", b"\x63\x00\x00\x00!\x00")  # compression, time, date
    assert unknown != whole
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:60] + bytes(len(whole) - 60), unknown):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="missing or damaged"):
            read_arrays(path)
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        read_arrays(path)
    with pytest.raises(UserError, match="missing"):
        read_arrays(tmp_path / "absent.npz")
