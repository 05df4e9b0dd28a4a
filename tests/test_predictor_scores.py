"""A predictor that does not rank is told, when it is trained and beside every prediction of a search."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from scipy import stats

from apq.files import read_json
from apq.genes import sample
from apq.presets import DIGITS
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_files import load_scores, save_predictor
from utils.predictor_scores import PredictorScores, cautions, resolution, scores_from_record
from utils.predictor_training import PredictorConfig, train_predictor

search = script("search")
QUICK = PredictorConfig(epochs=3, hidden=16)
GOOD = PredictorScores(n_train=160, n_holdout=40, rmse=0.01, kendall_tau=0.7, spearman=0.9, train_spread=0.02)


def scores(**changes):
    return PredictorScores(**{**asdict(GOOD), **changes})


def test_the_interval_of_tau_by_hand():
    """atanh(0.5) = 0.5493; 1.96 sqrt(0.437 / 43) = 0.1976: from tanh(0.3517) to tanh(0.7469)."""
    assert scores(kendall_tau=0.5, n_holdout=47).tau_interval == pytest.approx((0.3379, 0.6332), abs=5e-4)
    assert scores(kendall_tau=None).tau_interval is None
    assert scores(n_holdout=4).tau_interval is None


@pytest.mark.parametrize("n", [20, 47])
def test_the_interval_covers_the_tau_of_normal_pairs(n):
    """Pairs of a normal distribution of correlation r have tau 2/pi asin(r)."""
    r, rng, inside, repeats = 0.6, np.random.default_rng(0), 0, 400
    tau = 2 / math.pi * math.asin(r)
    for _ in range(repeats):
        x, y = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=n).T
        low, high = scores(kendall_tau=float(stats.kendalltau(x, y).statistic), n_holdout=n).tau_interval
        inside += low <= tau <= high
    assert 0.92 <= inside / repeats <= 0.985


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"kendall_tau": 0.3, "n_holdout": 20}, []),
        ({"kendall_tau": 0.299}, ["0.299"]),
        ({"kendall_tau": 0.0}, ["0.000"]),
        ({"kendall_tau": -0.894}, ["-0.894"]),
        ({"kendall_tau": None, "spearman": None}, ["undefined"]),
        ({"train_spread": 0.0}, ["equal"]),
        ({"n_holdout": 19}, ["only 19 pairs"]),
        ({"n_holdout": 5, "kendall_tau": -0.2}, ["-0.200", "only 5 pairs"]),
    ],
)
def test_what_is_told(changes, told):
    found = scores(**changes).warnings()
    assert len(found) == len(told)
    assert all(part in warning for part, warning in zip(told, found, strict=True))
    assert len(cautions(scores(**changes))) == (1 if told else 0)


def test_the_resolution_of_validation_images():
    """47 images: one is 1/47; sqrt(0.9 x 0.1 / 47) = 0.0438."""
    assert resolution(0.9, 47) == "47 validation images: one is 2.13 points, the standard error 4.38"


def test_constant_accuracies_are_told_and_do_not_ruin_a_transfer():
    genes = sample(DIGITS, 120, np.random.default_rng(0))
    first, found = train_predictor(genes, np.full(120, 0.7), DIGITS, quantize=False, config=QUICK)
    assert found.kendall_tau is None
    assert found.train_spread == 0.0
    assert len(found.warnings()) == 2
    moved, _ = train_predictor(genes, np.full(120, 0.7), DIGITS, quantize=True, initial=first, config=QUICK)
    assert np.abs(moved.predict(genes) - 0.7).max() < 0.1


def test_accuracies_of_pure_noise_are_told():
    rng = np.random.default_rng(1)
    genes = sample(DIGITS, 200, rng)
    found = train_predictor(genes, rng.uniform(0.5, 0.9, 200), DIGITS, quantize=False, config=QUICK)[1]
    assert any("hardly ranks" in warning for warning in found.warnings())


@pytest.mark.parametrize(
    "record", [None, 3, {}, {"n_train": 4}, {**asdict(GOOD), "rmse": "x"}, {**asdict(GOOD), "rmse": math.nan}]
)
def test_a_record_without_scores_has_none(record):
    assert scores_from_record(record) is None
    assert cautions(None) == []


def test_records_of_earlier_predictors_are_read():
    old = {key: value for key, value in asdict(GOOD).items() if key != "train_spread"}
    assert scores_from_record({**old, "later": 1}) == scores(train_spread=None)


@pytest.fixture
def predictor(tmp_path, monkeypatch):
    """A folder with a predictor of random weights; returns a function that writes it with these scores."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = AccuracyPredictor(DIGITS, 16)

    def write(found):
        save_predictor(tmp_path / "m/acc_quant.pt", net, {"scores": asdict(found)} if found else None)

    return write


EVOLUTION = ["--acc_predictor_dir", "m", "--constraint", "0.05", "--generations", "1", "--population", "8"]
NSGA2 = ["--mode", "nsga2", "--acc_predictor_dir", "m", "--generations", "1", "--population", "8"]


@pytest.mark.parametrize("flags", [EVOLUTION, NSGA2], ids=["evolution", "nsga2"])
def test_a_search_repeats_it_beside_the_prediction(predictor, capsys, flags):
    bad = scores(kendall_tau=-0.894, n_holdout=5)
    predictor(bad)
    assert load_scores(Path("m/acc_quant.pt")) == bad
    search([*flags, "--exp_name", "a"])
    lines = capsys.readouterr().out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("predicted top-1") and "%;" in line)
    assert lines[at + 1].startswith("warning: do not rely on the predictor")
    assert "-0.894" in lines[at + 1]
    search([*flags, "--exp_name", "b", "--json"])
    found = json.loads(capsys.readouterr().out)["predictor_scores"]
    assert (found["kendall_tau"], found["n_holdout"], len(found["warnings"])) == (-0.894, 5, 2)
    assert read_json(Path("exps/a/config.json"))["predictor_scores"] == asdict(bad)


def test_a_pick_repeats_it_without_the_predictor(predictor, capsys, tmp_path):
    predictor(scores(kendall_tau=0.1))
    search([*NSGA2, "--exp_name", "a"])
    (tmp_path / "m/acc_quant.pt").unlink()
    capsys.readouterr()
    search(["--mode", "nsga2", "--exp_name", "a", "--pick", "latency<=1000"])
    assert "warning: do not rely on the predictor" in capsys.readouterr().out


@pytest.mark.parametrize("found", [GOOD, None])
def test_nothing_is_told_of_a_good_or_published_predictor(predictor, capsys, found):
    predictor(found)
    search([*EVOLUTION, "--exp_name", "a"])
    assert "warning" not in capsys.readouterr().out
