"""Coarse-to-fine search through the scripts: files, continuation, other choices, errors."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from example_spaces import brute_force_front, made_up

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, read_jsonl, write_json
from apq.genes import genes_of
from apq.layers import layers_of
from apq.presets import DIGITS
from apq.subnet import subnet_from_spec
from dataset import load_splits
from dataset.splits import make_loader
from elastic_nn.networks.subnet_file import load_finetuned
from elastic_nn.training.engine import evaluate
from methods.coarse_to_fine import search as command
from utils.latency_predictor import LatencyPredictor

search, report, quant_aware = (script(name) for name in ("search", "test", "quant_aware"))
FLAGS = ["--mode", "coarse_to_fine", "--n_coarse", "12", "--intervals", "4", "--n_fine", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch, few_digits):
    """A working folder with the shipped supernet. Its subnets get synthetic accuracies; the calls are counted."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    calls = []

    def top1(self, subnet):
        calls.append(subnet)
        return float(made_up(DIGITS)(genes_of(DIGITS, [subnet]))[0])

    monkeypatch.setattr(command.Measurement, "top1", top1)
    return tmp_path, calls


def files_of(folder):
    """The files, without pictures and the record of the command, which has a date."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".png"]
    return {path.name: path.read_bytes() for path in files if path.name != "made_by.json"}


def test_the_experiment_is_whole(here, capsys):
    root, calls = here
    search([*FLAGS, "--exp_name", "a", "--json"])
    shown = json.loads(capsys.readouterr().out)
    records, front = read_jsonl(root / "exps/a/evaluated.jsonl"), read_json(root / "exps/a/front.json")
    assert len(records) == len(calls) == sum(shown["measured"].values())
    assert [r["index"] for r in records if r["stage"] == "coarse"] == list(range(12))
    assert set(records[0]) == {"stage", "index", "arch", "policy", "flops", "top1"}
    points = {(r["flops"], r["top1"]) for r in records}
    assert {(r["flops"], r["top1"]) for r in front} == brute_force_front(*map(np.array, zip(*points, strict=True)))
    assert [r["flops"] for r in front] == sorted(r["flops"] for r in front)
    for entry in front:
        layers = layers_of(DIGITS, subnet_from_spec(DIGITS, {**entry["arch"], **entry["policy"]}))
        assert entry["flops"] == sum(layer.macs for layer in layers)
        assert entry["bitops"] == sum(layer.bitops for layer in layers) == 64 * entry["weighted_flops"]
    best = front[-1]  # without a constraint the most accurate one
    assert read_json(root / "exps/a/arch") == [best["arch"], best["policy"]]
    assert read_json(root / "exps/a/acc") == [best["top1"]] == [shown["top1"]]
    assert read_json(root / "exps/a/lat") == [best["flops"]]
    _, space, _, images = load_finetuned(Experiment(root / "exps/a"))
    assert (space, images) == (DIGITS, read_json(root / "exps/a/evaluated.json")["images"])
    assert not list(root.glob("exps/a/.*"))


def search_killed_after(n, flags, calls, monkeypatch):
    """Run a search that is interrupted before its measurement `n`. `calls` counts them."""
    measured = command.Measurement.top1

    def top1(self, subnet):
        if len(calls) == n:
            raise KeyboardInterrupt
        return measured(self, subnet)

    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(command.Measurement, "top1", top1)
        with pytest.raises(KeyboardInterrupt):
            search(flags)


def test_a_killed_search_continues_and_finds_the_same(here, monkeypatch):
    root, calls = here
    search([*FLAGS, "--exp_name", "whole"])
    n, whole = len(calls), files_of(root / "exps/whole")
    for killed_after in (5, 14):  # in the coarse stage, in the fine one
        search_killed_after(killed_after, [*FLAGS, "--exp_name", f"killed-{killed_after}"], calls, monkeypatch)
        folder = root / f"exps/killed-{killed_after}"
        assert not (folder / "arch").exists()
        with (folder / "evaluated.jsonl").open("a") as file:
            file.write('{"stage": "coa')  # torn
        search([*FLAGS, "--exp_name", folder.name])
        assert len(calls) == n
        assert files_of(folder) == whole


def test_a_finished_search_stays_whole_until_another_takes_its_place(here, monkeypatch):
    root, calls = here
    search([*FLAGS, "--exp_name", "a"])
    calls.clear()
    search([*FLAGS, "--exp_name", "b", "--seed", "1"])
    n, old, new = len(calls), files_of(root / "exps/a"), files_of(root / "exps/b")
    search_killed_after(9, [*FLAGS, "--exp_name", "a", "--seed", "1", "--overwrite"], calls, monkeypatch)
    left = files_of(root / "exps/a")
    assert {name: left[name] for name in old} == old
    assert {*left} - {*old} == {"evaluated.state.json", "evaluated.state.jsonl"}
    search([*FLAGS, "--exp_name", "a", "--seed", "1", "--overwrite"])
    assert len(calls) == n  # none is measured twice
    assert files_of(root / "exps/a") == new


def test_another_constraint_chooses_again_without_measuring(here):
    root, calls = here
    flags = [*FLAGS, "--flops_min", "2e5"]  # so that the cheapest subnet of the space is not measured
    search([*flags, "--exp_name", "a"])
    front, before = read_json(root / "exps/a/front.json"), files_of(root / "exps/a")
    calls.clear()
    for entry, following in itertools.pairwise(front[:3]):
        search([*flags, "--exp_name", "a", "--constraint", str(following["flops"] - 1)])
        assert read_json(root / "exps/a/arch") == [entry["arch"], entry["policy"]]
        assert read_json(root / "exps/a/config.json")["constraint"] == following["flops"] - 1
    search([*flags, "--exp_name", "a", "--constraint", "2e7", "--type", "bitops"])
    assert 0 < read_json(root / "exps/a/lat")[0] <= 2e7
    assert calls == []
    search([*flags, "--exp_name", "a"])
    assert files_of(root / "exps/a") == before
    cheapest = front[0]["flops"]
    with pytest.raises(UserError, match=f"cheapest measured subnet, which needs {cheapest:.6g} MACs"):
        search(
            [
                *flags,
                "--exp_name",
                "a",
                "--constraint",
                str((cheapest + LatencyPredictor(type="flops", scope="full", space=DIGITS).cheapest()[0]) / 2),
            ]
        )
    assert files_of(root / "exps/a") == before


def test_a_choice_needs_no_flags_of_the_search(here):
    root, calls = here
    flags = [*FLAGS, "--flops_min", "2e5", "--seed", "3", "--acc_predictor_dir", "models/digits/."]
    search([*flags, "--exp_name", "a"])
    front, asked = read_json(root / "exps/a/front.json"), read_json(root / "exps/a/evaluated.json")
    calls.clear()
    search(["--mode", "coarse_to_fine", "--exp_name", "a", "--constraint", str(front[1]["flops"] - 1)])
    assert read_json(root / "exps/a/arch") == [front[0]["arch"], front[0]["policy"]]
    assert read_json(root / "exps/a/evaluated.json") == asked
    assert calls == []
    with pytest.raises(UserError, match=r"coarse_to_fine\.n_fine was 2, is 3; choose another --exp_name"):
        search(["--mode", "coarse_to_fine", "--exp_name", "a", "--n_fine", "3"])
    for script_ in (quant_aware, report):  # what a killed search leaves is told as such
        (root / "exps/b").mkdir(exist_ok=True)
        (root / "exps/b/evaluated.json").write_text((root / "exps/a/evaluated.json").read_text())
        (root / "exps/b/evaluated.jsonl").write_text((root / "exps/a/evaluated.jsonl").read_text())
        with pytest.raises(UserError, match=r"the search of exps/b is not finished: continue it"):
            script_(["--exp_dir", "exps/b"])


def test_what_may_not_be_replaced_is_kept(here):
    root, _ = here
    search([*FLAGS, "--exp_name", "a"])
    with pytest.raises(UserError, match=r"coarse_to_fine\.seed was 0, is 1; .*--overwrite"):
        search([*FLAGS, "--exp_name", "a", "--seed", "1"])
    first = (root / "exps/a/evaluated.jsonl").read_text()
    search([*FLAGS, "--exp_name", "a", "--seed", "1", "--overwrite"])
    assert (root / "exps/a/evaluated.jsonl").read_text() != first
    path = root / "exps/a/checkpoint/model_best.pth.tar"
    torch.save({**torch.load(path, weights_only=True), "train": {"epochs": 1}}, path)
    with pytest.raises(UserError, match="is finetuned"):
        search([*FLAGS, "--exp_name", "a", "--seed", "1", "--constraint", "2e5"])
    search([*FLAGS, "--exp_name", "a", "--seed", "1", "--constraint", "2e5", "--overwrite"])
    write_json(root / "exps/b/arch", [{}, {}])
    with pytest.raises(UserError, match="exists"):
        search([*FLAGS, "--exp_name", "b"])


def test_an_evolution_takes_the_place_of_it_whole(here):
    root, _ = here
    search([*FLAGS, "--exp_name", "a"])
    search(["--constraint", "0.05", "--generations", "2", "--population", "20", "--exp_name", "a", "--overwrite"])
    assert set(files_of(root / "exps/a")) == {"arch", "lat", "config.json", "history.jsonl"}
    assert (root / "exps/a/made_by.json").exists()
    assert not list((root / "exps/a").glob("front*"))


@pytest.mark.parametrize(
    "line", ['{"stage": "coarse"}', "[]", '{"stage": "coarse", "index": 9, "flops": 1, "top1": 1}']
)
def test_lines_of_another_search_are_refused(here, line):
    root, _ = here
    search([*FLAGS, "--exp_name", "a"])
    lines = (root / "exps/a/evaluated.jsonl").read_text().splitlines()
    (root / "exps/a/evaluated.jsonl").write_text("\n".join([*lines[:3], line, *lines[4:]]) + "\n")
    with pytest.raises(UserError, match="line 4: not a subnet of this search"):
        search([*FLAGS, "--exp_name", "a"])
    search([*FLAGS, "--exp_name", "a", "--overwrite"])  # measures again what is damaged
    assert sorted((root / "exps/a/evaluated.jsonl").read_text().splitlines()) == sorted(lines)
    (root / "exps/a/evaluated.jsonl").write_text("torn\n")
    search([*FLAGS, "--exp_name", "a", "--overwrite"])
    assert sorted((root / "exps/a/evaluated.jsonl").read_text().splitlines()) == sorted(lines)


def test_other_searches_leave_measurements_alone(here, monkeypatch):
    root, _ = here
    monkeypatch.setattr(command, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search([*FLAGS, "--exp_name", "a"])
    with pytest.raises(UserError, match=r"has evaluated\.json"):
        search(["--constraint", "0.05", "--generations", "2", "--population", "20", "--exp_name", "a"])
    assert (root / "exps/a/evaluated.jsonl").exists()


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([*FLAGS, "--constraint", "10"], "below the cheapest subnet of space digits"),
        ([*FLAGS, "--constraint", "nan"], "positive"),
        ([*FLAGS, "--n_coarse", "0"], "at least 1"),
        ([*FLAGS, "--flops_min", "5e5", "--flops_max", "1e5"], "must be below"),
        ([*FLAGS, "--flops_max", "1"], "must be below"),
        ([*FLAGS, "--flops_min", "1e9", "--flops_max", "2e9"], "no subnet of space digits"),
        ([*FLAGS, "--population", "5"], r"unrecognized arguments: --population 5 .*--mode coarse_to_fine --help"),
        ([*FLAGS, "--acc_predictor_dir", "nowhere"], "nowhere"),
        (["--constraint", "1", "--n_coarse", "5"], r"unrecognized arguments: --n_coarse 5 .*search.py --help"),
        (["--mode", "ddpg", "--model", "mobilenet_v2_small", "--type", "flops"], r"invalid choice: 'flops'.*bitops"),
        (["--mode", "sequential", "--constraint", "1", "--type", "flops"], r"invalid choice: 'flops'.*bitops"),
    ],
)
def test_mistakes_get_one_clear_line(here, flags, match):
    root, calls = here
    with pytest.raises(UserError, match=match):
        search(flags)
    assert calls == []
    assert not (root / "exps").exists()


def test_measured_as_test_py_does_it(tmp_path, monkeypatch, capsys, few_digits):
    """With real accuracies: the chosen weights have the accuracy that the search measured, and are reported."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    few = ["--n_coarse", "2", "--intervals", "1", "--n_fine", "1", "--recipe", "tiny", "--flops_min", "3e5"]
    search([*FLAGS, *few, "--exp_name", "a", "--json"])
    found = json.loads(capsys.readouterr().out)
    net, space, subnet, _ = load_finetuned(Experiment(tmp_path / "exps/a"))
    val = make_loader(load_splits(space).val, 256, sides=(subnet.resolution,))
    assert evaluate(net, val, torch.device("cpu")).top1 == found["top1"] > 0.5
    report(["--exp_dir", "exps/a", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["costs"] == found["costs"]
    full = shown["costs"]["full"]
    assert full["weighted_flops"] == full["bitops"] / 64
    report(["--exp_dir", "exps/a"])
    assert f"{full['weighted_flops'] / 1e6:.3f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        quant_aware(["--exp_name", "a"])
