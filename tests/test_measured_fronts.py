"""`search.py --mode nsga2 --measure`: points of a front, measured in the supernet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from few_images import IN_OTHER_PROCESSES

from apq.checkpoint import digest
from apq.errors import UserError
from apq.files import read_json, write_json
from apq.genes import genes_of
from apq.model_folder import ModelFolder
from apq.presets import QFA_MBV3_GLYPHS
from apq.subnet import subnet_from_spec
from dataset import load_splits
from elastic_nn.networks.supernet_file import load_supernet, save_supernet
from elastic_nn.quantizers import BATCHQUANT
from elastic_nn.training.engine import derived_seed
from elastic_nn.training.inheritance import first_supernet
from elastic_nn.training.pairs import short_finetune_top1, subnet_top1
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import Session
from methods.nsga2 import front_search as command
from methods.search.evaluated import EvaluatedStore
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_files import save_predictor

search, report = script("search"), script("test")

CPU = torch.device("cpu")
SPACE = replace(QFA_MBV3_GLYPHS, name="small-qfa", dataset="digits", n_classes=10, resolutions=(16,))
SEARCH = ["--mode", "nsga2", "--population", "20", "--generations", "3", "--acc_predictor_dir", "models/small-qfa"]
AS_THEY_ARE = ["--recipe", "tiny-qfa", "--measure"]
RECIPE = RECIPES["tiny-qfa"]
FEW = replace(RECIPE, name="few", recalibration_images=64, pair_epoch_images=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory, few_digits):
    """A supernet of random weights, and a predictor of random weights that is said to be for it."""
    root = tmp_path_factory.mktemp("measured")
    folder = ModelFolder(root / "models/small-qfa")
    folder.path.mkdir(parents=True)
    torch.manual_seed(0)
    splits = load_splits(SPACE)
    supernet = first_supernet(SPACE, BATCHQUANT, None, splits, 64, CPU)
    save_supernet(folder.supernet, supernet, "tiny-qfa", splits.source)
    made_for = {"data": {"supernet": digest(supernet.state_dict())}}
    save_predictor(folder.acc_quant, AccuracyPredictor(SPACE, 8), made_for)
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(made / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_search(monkeypatch):
    def searched(*args):
        raise AssertionError("searched again")

    return lambda: monkeypatch.setattr(command, "find_front", searched)


def front_of(name):
    return read_json(Path("exps") / name / "front.json")


def measured_of(name):
    """Index -> measured accuracy of the points that have one."""
    values = [point["measured_accuracy"] for point in front_of(name)]
    return {i: value for i, value in enumerate(values) if value is not None}


def files_of(name):
    folder = Path("exps") / name
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "made_by.json"}


def subnet_at(name, index):
    point = front_of(name)[index]
    return subnet_from_spec(SPACE, {**point["arch"], **point["policy"]})


def test_points_are_measured_as_they_are(here, capsys, no_search):
    search([*SEARCH, "--exp_name", "a"])
    assert not measured_of("a")
    chosen = (here / "exps/a/arch").read_bytes()
    no_search()
    capsys.readouterr()
    search([*SEARCH, "--exp_name", "a", *AS_THEY_ARE, "3"])
    text, n = capsys.readouterr().out, len(front_of("a"))
    measured = measured_of("a")
    assert [*measured] == [0, round((n - 1) / 2), n - 1]
    supernet, _ = load_supernet(here / "models/small-qfa/supernet.pt")
    session = Session(splits=load_splits(SPACE), device=CPU)
    for i, value in measured.items():
        images = session.splits.val
        assert value == subnet_top1(supernet, subnet_at("a", i), session, images, RECIPE.recalibration_images)
    gaps = [front_of("a")[i]["objectives"]["accuracy"] - value for i, value in measured.items()]
    assert "3 points measured as they are in the supernet, on images held out of training: predictions are " in text
    assert f"mean |difference| {100 * np.mean(np.abs(gaps)):.2f}" in text
    assert all(f"{value:.2%}" in text for value in measured.values())
    assert (here / "exps/a/arch").read_bytes() == chosen
    assert not list((here / "exps/a").glob("measured*"))

    values = iter([0.5] * 100)  # what is measured stays, whatever another measurement would give
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("methods.search.measurement.Measurement.top1", lambda *args: next(values))
        search([*SEARCH, "--exp_name", "a", *AS_THEY_ARE, "all", "--json"])
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured_of("a") == {i: measured.get(i, 0.5) for i in range(n)}
    assert [point["measured"] for point in shown["measured"]] == [*measured_of("a").values()]
    everything = np.array([[p["objectives"]["accuracy"], p["measured_accuracy"]] for p in front_of("a")])
    assert shown["mean_difference"] == pytest.approx(np.mean(everything[:, 0] - everything[:, 1]))


def test_a_pick_goes_by_the_prediction_and_shows_what_was_measured(here, capsys, no_search):
    search([*SEARCH, "--exp_name", "a", *AS_THEY_ARE, "3"])
    no_search()
    front = front_of("a")
    limit = front[[*measured_of("a")][1]]["objectives"]["latency"]
    within = [point for point in front if point["objectives"]["latency"] <= limit]
    best = max(within, key=lambda point: point["objectives"]["accuracy"])
    capsys.readouterr()
    search(["--mode", "nsga2", "--exp_name", "a", "--pick", f"latency<={limit}", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["picked"] == best["objectives"]
    assert (shown["predicted_accuracy"], shown["top1"]) == (best["objectives"]["accuracy"], best["measured_accuracy"])
    assert front_of("a") == front
    search(["--mode", "nsga2", "--front", "exps/a", "--exp_name", "b", "--pick", f"latency<={limit}"])
    line = f"predicted top-1 {best['objectives']['accuracy']:.2%}; top-1 {best['measured_accuracy']:.2%} measured; "
    assert line in capsys.readouterr().out
    assert front_of("b") == front


def test_points_are_measured_after_a_finetune(here, monkeypatch):
    monkeypatch.setitem(RECIPES, "few", FEW)
    epochs = ["--recipe", "few", "--finetune_epochs", "2"]
    search([*SEARCH, "--seed", "5", "--exp_name", "a", "--measure", "2", *epochs])
    measured = measured_of("a")
    supernet, _ = load_supernet(here / "models/small-qfa/supernet.pt")
    longer = replace(FEW, pair_finetune=replace(FEW.pair_finetune, epochs=2))
    assert len(measured) == 2
    for i, value in measured.items():
        genes = genes_of(SPACE, [subnet_at("a", i)])[0].tolist()
        session = Session(splits=load_splits(SPACE), device=CPU, seed=derived_seed(5, *genes))
        assert value == short_finetune_top1(supernet, subnet_at("a", i), session, longer)
    with pytest.raises(UserError, match=r"measured in another way: finetune.* --front exps/a --exp_name OTHER"):
        search(["--mode", "nsga2", "--exp_name", "a", *AS_THEY_ARE, "2"])
    assert measured_of("a") == measured
    search(["--mode", "nsga2", "--front", "exps/a", "--exp_name", "b", *AS_THEY_ARE, "1"])
    assert [*measured_of("b")] == [0]
    assert measured_of("a") == measured


def test_a_deterministic_measurement_is_another_one(here, monkeypatch):
    found = []

    def top1(*args):
        found.append(torch.are_deterministic_algorithms_enabled())
        return 0.5

    monkeypatch.setattr("methods.search.measurement.Measurement.top1", top1)
    search([*SEARCH, "--exp_name", "a", *AS_THEY_ARE, "1", "--deterministic"])
    assert found == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(UserError, match="measured in another way: deterministic was given, is not"):
        search(["--mode", "nsga2", "--exp_name", "a", *AS_THEY_ARE, "2"])
    assert found == [True]


def test_a_killed_measurement_continues(here, monkeypatch, capsys):
    search([*SEARCH, "--exp_name", "whole", *AS_THEY_ARE, "3"])
    appended, real = [], EvaluatedStore.append

    def append(*args):
        real(*args)
        appended.append(args)
        if len(appended) == 2:
            raise KeyboardInterrupt

    asked = [*SEARCH, "--exp_name", "killed", *AS_THEY_ARE, "3"]
    monkeypatch.setattr(EvaluatedStore, "append", append)
    with pytest.raises(KeyboardInterrupt):
        search(asked)
    assert not measured_of("killed")  # the front is there, and can be picked from
    with pytest.raises(UserError, match=r"another measurement of a front: finetune .*measured\.state"):
        search([*asked, "--finetune_epochs", "1"])
    capsys.readouterr()
    search(asked)
    assert "is finished" not in capsys.readouterr().out
    assert len(appended) == 3
    assert files_of("killed") == files_of("whole")


def test_processes_share_the_points(here, capsys, two_processes):
    def shared(*words):
        """Standard output of a script in two processes."""
        ranks = two_processes(words, here, **IN_OTHER_PROCESSES)
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
        return "".join(rank.stdout for rank in ranks)

    search([*SEARCH, "--exp_name", "one", *AS_THEY_ARE, "3"])
    shown = shared(ROOT / "search.py", *SEARCH, "--exp_name", "two", *AS_THEY_ARE, "3")
    assert shown.count("3 points measured") == 1
    assert len(measured_of("one")) == 3
    assert files_of("one") == files_of("two")

    capsys.readouterr()
    report(["--exp_dir", "exps/one", "--json"])
    alone = json.loads(capsys.readouterr().out)
    of_two = json.loads(shared(ROOT / "test.py", "--exp_dir", "exps/one", "--json"))
    assert of_two.pop("loss") == pytest.approx(alone.pop("loss"))
    assert of_two == alone


def test_fronts_of_earlier_versions_are_measured(here):
    search([*SEARCH, "--exp_name", "a"])
    write_json(
        here / "exps/a/front.json",
        [{key: value for key, value in point.items() if key != "measured_accuracy"} for point in front_of("a")],
    )
    search(["--mode", "nsga2", "--exp_name", "a", *AS_THEY_ARE, "1"])
    assert [*measured_of("a")] == [0]


@pytest.mark.parametrize("value", [1.5, -1, "0.5", True, [0.5]])
def test_impossible_measured_values_are_told(here, value):
    search([*SEARCH, "--exp_name", "a"])
    front = front_of("a")
    write_json(here / "exps/a/front.json", [{**front[0], "measured_accuracy": value}, *front[1:]])
    with pytest.raises(UserError, match=r"front\.json .*measured_accuracy .* is not a number from 0 to 1"):
        search(["--mode", "nsga2", "--exp_name", "a", "--pick", "latency<=9"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([*SEARCH, "--measure", "0"], "at least 1"),
        ([*SEARCH, "--measure", "some"], "'some'"),
        ([*SEARCH, "--finetune_epochs", "1"], "belong to --measure"),
        ([*SEARCH, "--recipe", "tiny"], "belong to --measure"),
        ([*SEARCH, "--deterministic"], "belong to --measure"),
        (["--mode", "nsga2", "--acc_predictor_dir", "digits", "--measure", "2"], "float supernet.* --finetune_epochs"),
        (["--mode", "nsga2", "--acc_predictor_dir", "other", "--measure", "2"], "is not the supernet that the predict"),
        (["--mode", "nsga2", "--exp_name", "typo", "--pick", "latency<=1", "--measure", "2"], "has no front to pick"),
    ],
)
def test_mistakes_are_told_before_any_search(here, no_search, flags, match):
    (here / "digits").symlink_to(ROOT / "models/digits")
    (here / "other").mkdir()
    for name in ("acc_quant.pt", "supernet.pt"):
        (here / "other" / name).write_bytes((here / "models/small-qfa" / name).read_bytes())
    data = torch.load(here / "other/supernet.pt", weights_only=True)
    data["state_dict"]["classifier.bias"] += 1
    torch.save(data, here / "other/supernet.pt")
    no_search()
    with pytest.raises(UserError, match=match):
        search(flags)
    assert not (here / "exps").exists()
