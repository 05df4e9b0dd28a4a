"""Predictors of several MLPs: they are those MLPs, trained and scored together."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from example_spaces import ALL, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.genes import sample
from apq.presets import DIGITS
from apq.resume import Resume
from utils.accuracy_predictor import AccuracyPredictor, transfer
from utils.converter import Converter
from utils.predictor_files import load_predictor, save_predictor
from utils.predictor_training import PredictorConfig, member_width, train_predictor

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)
quantizes = pytest.mark.parametrize("quantize", [True, False])


def ensemble(space, members=3, *, quantize=True, n_layers=3, seed=0):
    torch.manual_seed(seed)
    return AccuracyPredictor(space, 24, n_layers, quantize, members)


def alone(predictor, member):
    """One member as a predictor of its own."""
    found = AccuracyPredictor(predictor.space, predictor.hidden, predictor.n_layers, predictor.quantize)
    found.load_state_dict({key: value[member] for key, value in predictor.state_dict().items()})
    return found


def by_members(predictor, genes):
    """(members, n) predictions of the members, one after the other, without the fast form."""
    features = torch.from_numpy(Converter(predictor.space).encode(genes))
    with torch.no_grad():
        return np.stack([alone(predictor, m)(features).numpy() for m in range(predictor.members)])


@spaces
@quantizes
@given(seed=st.integers(0, 1000), members=st.integers(2, 5), n_layers=st.integers(1, 4))
@settings(max_examples=5)
def test_mean_and_spread_are_those_of_the_members(space, quantize, seed, members, n_layers):
    predictor = ensemble(space, members, quantize=quantize, n_layers=n_layers, seed=seed)
    genes = sample(space, 30, np.random.default_rng(seed))
    expected = by_members(predictor, genes)
    features = torch.from_numpy(Converter(space).encode(genes))
    with torch.no_grad():
        assert predictor(features).numpy() == pytest.approx(expected, abs=1e-5)
    mean, spread = predictor.mean_and_spread(genes)
    assert mean == pytest.approx(expected.mean(axis=0), abs=1e-5)
    assert spread == pytest.approx(expected.std(axis=0, ddof=1), abs=1e-5)
    assert np.array_equal(predictor.predict(genes), predictor.fast()(genes))
    assert predictor.predict(genes) == pytest.approx(mean, abs=1e-6)
    assert (mean.dtype, spread.dtype, mean.shape, spread.shape) == (np.float32, np.float32, (30,), (30,))


def test_many_candidates_in_chunks_are_the_same():
    predictor, genes = ensemble(TINY), sample(TINY, 3000, np.random.default_rng(0))
    mean, spread = predictor.mean_and_spread(genes)
    expected = by_members(predictor, genes)
    assert mean == pytest.approx(expected.mean(axis=0), abs=1e-5)
    assert spread == pytest.approx(expected.std(axis=0, ddof=1), abs=1e-5)
    assert [part.shape for part in predictor.mean_and_spread(genes[:0])] == [(0,), (0,)]


def test_one_member_has_no_spread_and_the_published_weights():
    predictor, genes = ensemble(TINY, 1), sample(TINY, 9, np.random.default_rng(0))
    mean, spread = predictor.mean_and_spread(genes)
    assert np.array_equal(mean, predictor.predict(genes))
    assert not spread.any()
    assert predictor.state_dict()["regressor.weight"].shape == (1, 24)


def test_members_start_from_weights_of_the_size_of_torch():
    """nn.Linear draws from a uniform distribution of -1/sqrt(n_in) to 1/sqrt(n_in): variance 1/(3 n_in)."""
    weights = AccuracyPredictor(TINY, 100, members=4).layers[1][0].weight
    assert weights.abs().max() <= 0.1
    assert weights.var().item() == pytest.approx(1 / 300, rel=0.05)
    assert not weights[0].equal(weights[1])


@pytest.mark.parametrize(("hidden", "members"), [(400, 2), (400, 3), (400, 5), (600, 4), (16, 3), (9, 64)])
def test_members_together_multiply_as_much_as_one(hidden, members):
    width = member_width(hidden, members)
    assert width % 8 == 0
    assert abs(width - hidden / math.sqrt(members)) <= 4 or width == 8
    assert member_width(hidden, 1) == hidden


def pairs(n=60):
    genes = sample(DIGITS, n, np.random.default_rng(0))
    features = Converter(DIGITS).encode(genes)
    return genes, 0.8 + 0.02 * np.tanh(features @ np.random.default_rng(1).normal(size=features.shape[1]))


WHOLE = PredictorConfig(epochs=5, hidden=24, batch_size=100, lr=1e-3)  # all pairs in a step: their order is no matter


@pytest.mark.parametrize("quantized_start", [True, False], ids=["further", "transferred"])
def test_members_are_trained_as_if_alone(quantized_start):
    genes, accuracies = pairs()
    start = ensemble(DIGITS, 3, quantize=quantized_start)
    together, _ = train_predictor(
        genes, accuracies, DIGITS, quantize=True, initial=start, config=dataclasses.replace(WHOLE, members=3)
    )
    for member in range(3):
        own, _ = train_predictor(genes, accuracies, DIGITS, quantize=True, initial=alone(start, member), config=WHOLE)
        assert alone(together, member).predict(genes) == pytest.approx(own.predict(genes), abs=2e-5)


def test_members_differ_and_their_mean_predicts():
    genes, accuracies = pairs(300)
    config = PredictorConfig(epochs=40, hidden=32, lr=1e-3, members=3)
    predictor, scores = train_predictor(genes, accuracies, DIGITS, quantize=True, config=config)
    again, same = train_predictor(genes, accuracies, DIGITS, quantize=True, config=config)
    assert all(a.equal(b) for a, b in zip(predictor.state_dict().values(), again.state_dict().values(), strict=True))
    assert scores == same
    mean, spread = predictor.mean_and_spread(genes)
    assert (spread > 0).all()
    assert spread.mean() < accuracies.std()
    assert scores.rmse < 0.8 * accuracies.std()
    rmse = [np.sqrt(np.mean((row - accuracies) ** 2)) for row in by_members(predictor, genes)]
    assert np.sqrt(np.mean((mean - accuracies) ** 2)) <= np.sqrt(np.mean(np.square(rmse)))  # of a mean: by convexity


def test_one_float_predictor_starts_all_members():
    full = ensemble(DIGITS, 1, quantize=False)
    genes = sample(DIGITS, 20, np.random.default_rng(0))
    several = transfer(full, 4)
    assert several.members == 4
    assert by_members(several, genes) == pytest.approx(np.tile(full.predict(genes), (4, 1)), abs=1e-6)
    assert transfer(ensemble(DIGITS, 3, quantize=False)).members == 3
    start, config = ensemble(DIGITS, 3, quantize=False), dataclasses.replace(WHOLE, members=2)
    with pytest.raises(UserError, match="has 3 members, so the quantized one cannot have 2"):
        train_predictor(*pairs(), DIGITS, quantize=True, initial=start, config=config)


def test_a_killed_training_continues_with_the_same_members(tmp_path):
    genes, accuracies = pairs()
    config = PredictorConfig(epochs=4, hidden=16, members=3)
    expected, _ = train_predictor(genes, accuracies, DIGITS, quantize=True, config=config)

    class Killed(Resume):
        def save(self, state):
            super().save(state)
            if state["epoch"] == 2:
                raise KeyboardInterrupt

    file = tmp_path / "training.state.pt"
    with pytest.raises(KeyboardInterrupt):
        train_predictor(genes, accuracies, DIGITS, quantize=True, config=config, resume=Killed(file, {}, "training"))
    found, _ = train_predictor(genes, accuracies, DIGITS, quantize=True, config=config, resume=Resume(file, {}, "t"))
    assert all(a.equal(b) for a, b in zip(expected.state_dict().values(), found.state_dict().values(), strict=True))


@spaces
@quantizes
def test_files_keep_all_members(space, quantize, tmp_path):
    predictor, genes = ensemble(space, 4, quantize=quantize), sample(space, 10, np.random.default_rng(0))
    save_predictor(tmp_path / "p.pt", predictor)
    again = load_predictor(tmp_path / "p.pt", space)
    assert (again.members, again.hidden, again.n_layers, again.quantize) == (4, 24, 3, quantize)
    for found, expected in zip(again.mean_and_spread(genes), predictor.mean_and_spread(genes), strict=True):
        assert np.array_equal(found, expected)


def test_members_of_different_sizes_are_refused(tmp_path):
    save_predictor(tmp_path / "p.pt", ensemble(TINY, 3))
    data = load_checkpoint(tmp_path / "p.pt")
    data["state_dict"]["regressor.bias"] = torch.zeros(2, 1)
    save_checkpoint(tmp_path / "p.pt", data)
    with pytest.raises(UserError, match="does not hold a predictor of space tiny"):
        load_predictor(tmp_path / "p.pt")
