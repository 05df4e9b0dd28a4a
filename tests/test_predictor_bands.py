"""Where a predictor is bad: scores in bands of cost, in its file and beside what a search finds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import script
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from apq.genes import sample, subnets_of
from apq.presets import DIGITS
from lut.population import PopulationCost
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_bands import Band, Bands, bands_from_record, bands_of, cautions_of_band
from utils.predictor_files import load_bands, save_predictor
from utils.predictor_scores import interval_of_tau, top_decile

search = script("search")


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return AccuracyPredictor(DIGITS, 16)


def test_bands_are_scored_as_their_pairs_alone(predictor):
    """Brute force: sorted by BitOps, a quarter each."""
    genes, rng = sample(DIGITS, 42, np.random.default_rng(0)), np.random.default_rng(1)
    accuracies = rng.uniform(0.5, 0.9, 42)
    costs, predicted = PopulationCost(DIGITS, "bitops").predict(genes), predictor.predict(genes).astype(np.float64)
    found = bands_of(predictor, genes, accuracies)
    order = sorted(range(42), key=lambda i: (costs[i], i))
    assert (found.quantity, [band.n for band in found.bands]) == ("bitops", [11, 11, 10, 10])
    start = 0
    for band in found.bands:
        rows = order[start : start + band.n]
        start += band.n
        assert (band.low, band.high) == (min(costs[rows]), max(costs[rows]))
        errors = [predicted[i] - accuracies[i] for i in rows]
        assert band.rmse == pytest.approx(np.sqrt(sum(e * e for e in errors) / band.n))
        assert band.bias == pytest.approx(sum(errors) / band.n)
        assert band.kendall_tau == pytest.approx(stats.kendalltau(predicted[rows], accuracies[rows]).statistic)
        best = max(rows, key=lambda i: predicted[i])
        assert band.top_decile == float(accuracies[best] == max(accuracies[rows]))


def test_a_float_predictor_has_bands_of_macs():
    genes = sample(DIGITS, 12, np.random.default_rng(0))
    found = bands_of(AccuracyPredictor(DIGITS, 8, quantize=False), genes, np.linspace(0, 1, 12))
    assert (found.quantity, len(found.bands)) == ("flops", 1)


@given(values=st.lists(st.integers(0, 5), min_size=1, max_size=50), seed=st.integers(0, 99))
def test_the_top_tenth_by_brute_force(values, seed):
    measured = np.array(values, dtype=float)
    predicted = np.random.default_rng(seed).permutation(measured)
    n = max(1, round(len(values) / 10))
    best = sorted(range(len(values)), key=lambda i: (-predicted[i], i))[:n]
    truly = sorted(range(len(values)), key=lambda i: (-measured[i], i))[:n]
    assert top_decile(predicted, measured) == len({*best} & {*truly}) / n
    assert top_decile(measured, measured) == 1


def test_a_band_with_large_errors_is_bad(predictor):
    genes = sample(DIGITS, 40, np.random.default_rng(0))
    order = np.argsort(PopulationCost(DIGITS, "bitops").predict(genes), kind="stable")
    errors = np.full(40, 0.01)
    errors[order[:10]] = 0.05  # of all: sqrt((0.05^2 + 3 x 0.01^2) / 4) = 0.0265; 0.05 is 1.9 times that
    found = bands_of(predictor, genes, predictor.predict(genes) - errors)
    assert [band.is_bad for band in found.bands] == [True, False, False, False]
    assert [band.bias for band in found.bands] == pytest.approx([0.05, 0.01, 0.01, 0.01], abs=1e-6)


def test_a_band_that_does_not_rank_is_bad(predictor):
    """tau -1 is undefined in the interval; of 15 pairs reversed but for a few, the upper end is far below 0.3."""
    genes = sample(DIGITS, 30, np.random.default_rng(0))
    order = np.argsort(PopulationCost(DIGITS, "bitops").predict(genes), kind="stable")
    accuracies = predictor.predict(genes).astype(np.float64)
    cheap = order[:15]
    ranks = np.argsort(np.argsort(accuracies[cheap]))
    accuracies[cheap] = np.sort(accuracies[cheap])[::-1][ranks]
    accuracies[order[15:]] += 0.05  # so that the errors of the first band stand out by nothing but their order
    best, second = np.argsort(-accuracies[cheap])[:2]
    accuracies[cheap[[best, second]]] = accuracies[cheap[[second, best]]]
    found = bands_of(predictor, genes, accuracies, 2)
    assert found.bands[0].kendall_tau < -0.9
    assert [band.is_bad for band in found.bands] == [True, False]


def test_a_band_is_bad_only_if_it_surely_does_not_rank(predictor):
    """Of 15 pairs with tau about 0.4 the interval at 95 % is 0.02 to 0.68: it may well be above 0.3."""
    genes = sample(DIGITS, 15, np.random.default_rng(0))
    accuracies = predictor.predict(genes).astype(np.float64)
    ranks = [3, 0, 5, 1, 8, 2, 10, 4, 6, 13, 7, 9, 14, 11, 12]
    swapped = np.empty(15)
    swapped[np.argsort(accuracies)] = np.sort(accuracies)[[14 - r if r % 4 == 1 else r for r in ranks]]
    (band,) = bands_of(predictor, genes, swapped, 1).bands
    low, high = interval_of_tau(band.kendall_tau, 15)
    assert low < 0.3 < high
    assert not band.is_bad


BAND = Band(low=10.0, high=20.0, n=10, rmse=0.01, bias=0.0, kendall_tau=0.5, top_decile=1.0, is_bad=False)
BANDS = Bands(quantity="bitops", bands=(BAND, replace(BAND, low=21.0, high=30.0, rmse=0.1, is_bad=True)))


@pytest.mark.parametrize(("cost", "index"), [(3, 0), (10, 0), (20, 0), (20.5, 1), (30, 1), (99, 1)])
def test_the_band_of_a_cost(cost, index):
    assert BANDS.of(cost) is BANDS.bands[index]


def test_records_are_read_back(tmp_path, predictor):
    assert bands_from_record(json.loads(json.dumps(BANDS.record()))) == BANDS
    save_predictor(tmp_path / "p.pt", predictor, {"bands": BANDS.record()})
    assert load_bands(tmp_path / "p.pt") == BANDS
    save_predictor(tmp_path / "p.pt", predictor)
    assert load_bands(tmp_path / "p.pt") is None


@pytest.mark.parametrize(
    "record",
    [
        None,
        3,
        {},
        {"quantity": "bitops", "bands": []},
        {"quantity": "latency", "bands": [vars(BAND)]},
        {"quantity": ["bitops"], "bands": [vars(BAND)]},
        {"quantity": "bitops", "bands": [{"low": 1}]},
        {"quantity": "bitops", "bands": [{**vars(BAND), "rmse": float("nan")}]},
        {"quantity": "bitops", "bands": [{**vars(BAND), "n": 0}]},
        {"quantity": "bitops", "bands": [{**vars(BAND), "is_bad": "no"}]},
        {"quantity": "bitops", "bands": 7},
    ],
)
def test_other_records_have_no_bands(record):
    assert bands_from_record(record) is None
    assert cautions_of_band(None, DIGITS, subnets_of(DIGITS, sample(DIGITS, 1, np.random.default_rng(0)))[0]) == []


def around(cost, **changes):
    """One band of digits from half of a cost to twice as much."""
    return Bands(quantity="bitops", bands=(replace(BAND, low=cost / 2, high=2 * cost, **changes),))


def test_a_found_subnet_in_a_bad_band_is_told(tmp_path, monkeypatch, capsys, predictor):
    genes = sample(DIGITS, 1, np.random.default_rng(0))
    cost = float(PopulationCost(DIGITS, "bitops").predict(genes)[0])
    (subnet,) = subnets_of(DIGITS, genes)
    assert around(cost).caution(DIGITS, subnet) == []
    assert "the predictor is bad around" in around(cost, is_bad=True).caution(DIGITS, subnet)[0]
    assert "no held-out pair is as cheap" in around(5 * cost).caution(DIGITS, subnet)[0]
    monkeypatch.chdir(tmp_path)
    everywhere = Bands(quantity="bitops", bands=(replace(BAND, low=0.0, high=1e12, is_bad=True),))
    save_predictor(tmp_path / "m/acc_quant.pt", predictor, {"bands": everywhere.record()})
    flags = ["--acc_predictor_dir", "m", "--generations", "1", "--population", "8"]
    for name, how in (("a", ["--constraint", "0.05"]), ("b", ["--mode", "nsga2"])):
        search([*flags, *how, "--exp_name", name])
        assert "warning: the predictor is bad around" in capsys.readouterr().out
        search([*flags, *how, "--exp_name", name, "--overwrite", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["in_bad_band"] is True
        assert found["predictor_bands"] == everywhere.record()
    (tmp_path / "m/acc_quant.pt").unlink()  # a pick reads the bands of the search
    search(["--mode", "nsga2", "--exp_name", "b", "--pick", "latency<=1000"])
    assert "warning: the predictor is bad around" in capsys.readouterr().out
