from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from example_spaces import TINY
from hypothesis import given
from hypothesis import strategies as st

from apq.errors import UserError
from apq.genes import sample, view
from apq.presets import DIGITS
from utils.accuracy_predictor import AccuracyPredictor
from utils.converter import Converter
from utils.predictor_scores import PredictorScores, score
from utils.predictor_training import PredictorConfig, holdout_split, train_predictor

QUICK = PredictorConfig(epochs=40, hidden=64, lr=1e-3, weight_decay=3.0)


def accuracy_of(genes, *, policy=True, seed=0):
    """A synthetic accuracy around 0.8: a saturating sum over the one-hot vector."""
    converter = Converter(DIGITS)
    weights = np.random.default_rng(seed).uniform(0, 0.3, converter.full_dim)
    features = converter.encode(genes)
    if not policy:
        features[:, converter.half_dim :] = 0
    return 0.8 + 0.1 * np.tanh(features @ weights - (7 if policy else 2.5))


@pytest.fixture(scope="module")
def pairs():
    genes = sample(DIGITS, 400, np.random.default_rng(0))
    return genes, accuracy_of(genes, policy=False)


@given(n=st.integers(10, 500), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_holdout_splits_all_pairs_in_two(n, fraction, seed):
    train, held_out = holdout_split(n, fraction, seed)
    assert sorted([*train, *held_out]) == list(range(n))
    assert min(len(train), len(held_out)) >= 2
    assert abs(len(held_out) - n * fraction) <= 2
    again = holdout_split(n, fraction, seed)
    assert np.array_equal(train, again[0])
    assert np.array_equal(held_out, again[1])


def test_another_seed_splits_otherwise():
    assert not np.array_equal(holdout_split(100, 0.2, 0)[1], holdout_split(100, 0.2, 1)[1])


def test_float_pairs_are_learned(pairs):
    predictor, scores = train_predictor(*pairs, DIGITS, quantize=False, config=QUICK)
    assert (scores.n_train, scores.n_holdout) == (320, 80)
    assert scores.rmse < 0.5 * pairs[1].std()
    assert scores.kendall_tau > 0.6
    assert scores.spearman > 0.8
    assert not predictor.quantize
    assert not predictor.training
    assert predictor.predict(pairs[0]).mean() == pytest.approx(pairs[1].mean(), abs=0.02)


def test_transfer_beats_scratch_on_few_quantized_pairs(pairs):
    full, _ = train_predictor(*pairs, DIGITS, quantize=False, config=QUICK)
    genes = sample(DIGITS, 100, np.random.default_rng(1))
    train = (genes, accuracy_of(genes), DIGITS)
    transferred, scores = train_predictor(*train, quantize=True, initial=full, config=QUICK)
    scratch, _ = train_predictor(*train, quantize=True, config=QUICK)
    unseen = sample(DIGITS, 500, np.random.default_rng(2))
    by_transfer, by_scratch = (score(p, unseen, accuracy_of(unseen)) for p in (transferred, scratch))
    assert transferred.quantize
    assert scores.n_holdout == 20
    assert by_transfer.kendall_tau > by_scratch.kendall_tau
    assert by_transfer.kendall_tau > 0.5


def test_the_initial_predictor_is_left_alone(pairs):
    initial = AccuracyPredictor(DIGITS, 32, quantize=False)
    before = initial.predict(pairs[0])
    trained, _ = train_predictor(*pairs, DIGITS, quantize=False, initial=initial, config=PredictorConfig(epochs=1))
    assert np.array_equal(initial.predict(pairs[0]), before)
    assert (trained.hidden, trained.n_layers) == (32, 3)


def test_a_trained_predictor_is_the_start_of_further_training(pairs):
    config = PredictorConfig(epochs=1, hidden=64, lr=1e-9)
    trained, _ = train_predictor(*pairs, DIGITS, quantize=False, config=QUICK)
    further, _ = train_predictor(*pairs, DIGITS, quantize=False, initial=trained, config=config)
    quantized, _ = train_predictor(*pairs, DIGITS, quantize=True, initial=trained, config=config)
    for predictor in (further, quantized):  # normalising targets changes nothing by itself
        assert predictor.predict(pairs[0]) == pytest.approx(trained.predict(pairs[0]), abs=1e-5)


@pytest.mark.parametrize("quantize", [True, False])
def test_same_seed_same_weights(pairs, quantize):
    config = dataclasses.replace(QUICK, epochs=2)
    runs = [train_predictor(*pairs, DIGITS, quantize=quantize, config=config) for _ in range(2)]
    other = train_predictor(*pairs, DIGITS, quantize=quantize, config=dataclasses.replace(config, seed=1))
    first, again = (predictor.state_dict() for predictor, _ in runs)
    assert all(first[key].equal(again[key]) for key in first)
    assert runs[0][1] == runs[1][1]
    assert not first["regressor.weight"].equal(other[0].state_dict()["regressor.weight"])


def test_held_out_pairs_never_influence_training(pairs):
    config = dataclasses.replace(QUICK, epochs=2)
    genes, accuracies = pairs
    _, held_out = holdout_split(len(genes), config.holdout, config.seed)
    spoiled_genes, spoiled = genes.copy(), accuracies.copy()
    spoiled[held_out] = 0.1
    spoiled_genes[held_out] = genes[held_out[::-1]]
    first, _ = train_predictor(genes, accuracies, DIGITS, quantize=False, config=config)
    second, _ = train_predictor(spoiled_genes, spoiled, DIGITS, quantize=False, config=config)
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_a_full_precision_predictor_ignores_bits(pairs):
    predictor, _ = train_predictor(*pairs, DIGITS, quantize=False, config=dataclasses.replace(QUICK, epochs=1))
    changed = pairs[0].copy()
    view(DIGITS, changed).bits[:] = 2
    assert np.array_equal(predictor.predict(changed), predictor.predict(pairs[0]))


def test_constant_accuracies_have_no_ranking(pairs):
    scores = train_predictor(
        pairs[0][:20], np.full(20, 0.7), DIGITS, quantize=False, config=dataclasses.replace(QUICK, epochs=1)
    )[1]
    assert isinstance(scores, PredictorScores)
    assert (scores.kendall_tau, scores.spearman) == (None, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_accuracies_must_be_numbers(pairs, bad):
    accuracies = pairs[1].copy()
    accuracies[7] = bad
    with pytest.raises(UserError, match="pair 7"):
        train_predictor(pairs[0], accuracies, DIGITS, quantize=False)


def test_wrong_inputs_are_refused(pairs):
    genes, accuracies = pairs
    with pytest.raises(UserError, match="9 pairs are too few"):
        train_predictor(genes[:9], accuracies[:9], DIGITS, quantize=False)
    with pytest.raises(UserError, match="400 subnets but 399"):
        train_predictor(genes, accuracies[:-1], DIGITS, quantize=False)
    with pytest.raises(UserError, match="tiny, not to digits"):
        train_predictor(genes, accuracies, DIGITS, quantize=True, initial=AccuracyPredictor(TINY, 8))
    with pytest.raises(UserError, match="full-precision"):
        train_predictor(genes, accuracies, DIGITS, quantize=False, initial=AccuracyPredictor(DIGITS, 8))


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"lr": 0.0}, {"holdout": 1.0}, {"weight_decay": -1.0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UserError):
        PredictorConfig(**setting)
