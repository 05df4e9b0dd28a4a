"""Predictors that learn from what searches measured: what is held out, and what is an outlier."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from example_spaces import TINY
from hypothesis import given
from hypothesis import strategies as st

from apq.errors import UserError
from apq.genes import sample
from elastic_nn.training.recipe import OutlierRule
from methods.search.surrogate import Surrogate, config_of
from utils.predictor_training import FEWEST_PAIRS, PredictorConfig, checked_split

QUICK = PredictorConfig(epochs=2, hidden=8)


def surrogate(n=20, **more):
    rng = np.random.default_rng(0)
    facts = {"space": TINY, "quantize": True, "genes": sample(TINY, n, rng), "accuracies": rng.random(n)}
    return Surrogate(**{**facts, "config": QUICK, **more})


@given(n=st.integers(FEWEST_PAIRS, 60), n_measured=st.integers(0, 40), seed=st.integers(0, 99))
def test_measured_subnets_are_trained_on_and_the_same_pairs_are_held_out(n, n_measured, seed):
    genes, accuracies = np.zeros((n + n_measured, 4), dtype=int), np.zeros(n + n_measured)
    config = PredictorConfig(seed=seed)
    alone_train, alone = checked_split(genes[:n], accuracies[:n], config)
    train, held_out = checked_split(genes, accuracies, config, n_measured=n_measured)
    assert held_out.tolist() == alone.tolist()
    assert train.tolist() == [*alone_train, *range(n, n + n_measured)]


def test_measured_subnets_do_not_make_up_for_pairs():
    genes, accuracies = np.zeros((40, 4), dtype=int), np.zeros(40)
    with pytest.raises(UserError, match="9 pairs are too few"):
        checked_split(genes, accuracies, PredictorConfig(), n_measured=31)


def test_measured_subnets_are_never_outliers():
    """Two pairs far from all others, and a measured subnet as far."""
    rule = OutlierRule(neighbours=2, distances=(1.0,), flops_unit=1e12)
    accuracies = np.full(20, 0.5)
    accuracies[[3, 7]] = 0.1, 0.9
    pairs = surrogate(accuracies=accuracies, rule=rule)
    far = pairs.with_measured(pairs.genes[:1], np.array([0.3]))
    assert np.flatnonzero(pairs.outliers).tolist() == [3, 7]
    assert np.flatnonzero(far.outliers).tolist() == [3, 7]
    assert len(far.outliers) == 21
    train, _ = checked_split(far.genes, far.accuracies, QUICK, far.outliers, far.n_measured)
    assert 20 in train
    assert not {3, 7} & {*train}


@pytest.mark.parametrize("is_kernel", [False, True])
def test_held_out_pairs_are_scored_alike_and_measured_ones_change_the_predictor(is_kernel):
    pairs = surrogate(is_kernel=is_kernel)
    genes = sample(TINY, 3, np.random.default_rng(1))
    before, scores, _ = pairs.trained()
    after, more, bands = pairs.with_measured(genes, np.array([0.9, 0.8, 0.7])).trained()
    assert scores.n_holdout == more.n_holdout == sum(band.n for band in bands.bands) == 4
    assert (scores.n_train, more.n_train) == (16, 19)
    assert (before.predict(genes) != after.predict(genes)).any()


def test_others_take_the_place_of_measured_subnets():
    pairs, genes = surrogate(), sample(TINY, 5, np.random.default_rng(1))
    once = pairs.with_measured(genes[:2], np.array([0.1, 0.2]))
    twice = once.with_measured(genes, np.linspace(0.1, 0.5, 5))
    assert twice.n_measured == 5
    assert (twice.genes == np.concatenate([pairs.genes, genes])).all()
    assert twice.accuracies.tolist() == [*pairs.accuracies, *np.linspace(0.1, 0.5, 5)]
    none = twice.with_measured(genes[:0], np.zeros(0))
    assert none.asked() == pairs.asked()
    assert "n_measured" not in none.asked()  # as earlier versions recorded it
    assert twice.asked() != once.asked() != none.asked()


def test_settings_of_a_file_come_back():
    config = PredictorConfig(epochs=3, lr=1e-3, hidden=16, members=4, seed=7)
    assert config_of(surrogate(config=config).settings(), 0) == config
    kernel = surrogate(config=config, is_kernel=True).settings()
    assert config_of(kernel, 0) == PredictorConfig(seed=7)
    assert config_of({}, 5) == PredictorConfig(seed=5)
    for wrong in ({"epochs": "9"}, {"epochs": 1.5}, {"members": True}, {"lr": float("nan")}, {"seed": -1}):
        with pytest.raises(UserError, match=f"settings are damaged: {next(iter(wrong))}"):
            config_of({**asdict(config), **wrong}, 0)
