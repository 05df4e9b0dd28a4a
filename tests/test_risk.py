"""--risk ranks candidates by their predicted accuracy less some spreads of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json
from apq.genes import genes_of, sample
from apq.presets import DIGITS
from apq.search_result import read_result
from methods.nsga2.front_records import load_front
from methods.search.predicted import cautious
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_files import save_predictor

search = script("search")
QUICK = ["--acc_predictor_dir", "m", "--generations", "8", "--population", "24"]
EVOLUTION = [*QUICK, "--constraint", "0.05"]
NSGA2 = ["--mode", "nsga2", *QUICK]


@pytest.fixture
def predictor(tmp_path, monkeypatch):
    """A predictor of three members of random weights in the folder m."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = AccuracyPredictor(DIGITS, 16, members=3)
    save_predictor(tmp_path / "m/acc_quant.pt", net)
    return net


def test_the_rank_is_the_mean_less_spreads():
    torch.manual_seed(0)
    predictor = AccuracyPredictor(DIGITS, 16, members=3)
    genes = sample(DIGITS, 50, np.random.default_rng(0))
    fast = predictor.fast()
    mean, spread = fast.mean_and_spread(genes)
    assert cautious(fast, 2.5)(genes) == pytest.approx(mean - 2.5 * spread, abs=1e-6)
    assert cautious(fast, None) is fast
    with pytest.raises(UserError, match="several members"):
        cautious(AccuracyPredictor(DIGITS, 16).fast(), 1.0)


def test_evolution_finds_the_best_by_that_rank(predictor, capsys):
    search([*EVOLUTION, "--exp_name", "bold"])
    search([*EVOLUTION, "--exp_name", "careful", "--risk", "3"])
    assert "3 spreads lower" in capsys.readouterr().out
    rank, found = cautious(predictor.fast(), 3), {}
    for name in ("bold", "careful"):
        result = read_result(Experiment(Path(f"exps/{name}")))
        found[name] = genes_of(DIGITS, [result.found_subnet.subnet])
        assert result.predicted_top1 == pytest.approx(predictor.predict(found[name])[0], abs=1e-6)
    assert rank(found["careful"])[0] > rank(found["bold"])[0]
    assert read_json(Path("exps/careful/config.json"))["risk"] == 3
    assert "risk" not in read_json(Path("exps/bold/config.json"))


def test_a_front_is_that_of_the_rank(predictor, capsys):
    search([*NSGA2, "--exp_name", "f", "--risk", "2"])
    assert "less 2 times the spread" in capsys.readouterr().out
    front, result = load_front(Experiment(Path("exps/f")))
    assert front.values[:, 0] == pytest.approx(cautious(predictor.fast(), 2)(front.genes), abs=1e-6)
    assert result.settings["risk"] == 2
    with pytest.raises(UserError, match="risk was 2"):
        search([*NSGA2, "--exp_name", "f", "--pick", "latency<=1000", "--risk", "1"])
    search(["--mode", "nsga2", "--exp_name", "f", "--pick", "latency<=1000", "--risk", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["front"] == len(front.genes)


@pytest.mark.parametrize("flags", [EVOLUTION, NSGA2], ids=["evolution", "nsga2"])
def test_one_member_is_refused_before_the_search(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    save_predictor(tmp_path / "m/acc_quant.pt", AccuracyPredictor(DIGITS, 16))
    with pytest.raises(UserError, match="several members"):
        search([*flags, "--risk", "1", "--exp_name", "a"])
    assert not Path("exps/a").exists()
