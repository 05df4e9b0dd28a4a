"""Outliers among pairs, by hand; predictors are not trained on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from example_spaces import TINY

from apq.errors import UserError
from apq.genes import sample, subnets_of
from apq.layers import layers_of
from apq.presets import QFA_MBV3_GLYPHS
from elastic_nn.training.recipe import OutlierRule
from methods.search.outliers import isolated, outliers_among
from utils.predictor_training import PredictorConfig, train_predictor, training_record


def test_outliers_by_hand():
    """Distances on a line. With 3 neighbours, the point itself among them, the mean is (0 + nearest + second) / 3."""
    points = np.array([[0.0, 0], [1, 0], [2, 0], [3, 0], [7, 0]])
    # First round: 1, 2/3, 2/3, 1, 3. Second, without the last point: 1, 2/3, 2/3, 1.
    assert isolated(points, OutlierRule(neighbours=3, distances=(1.0,))).tolist() == [False] * 4 + [True]
    twice = OutlierRule(neighbours=3, distances=(2.9, 0.9))
    assert isolated(points, twice).tolist() == [True, False, False, True, True]
    # A third round has two points, with themselves and each other as neighbours: 1/2.
    rule = OutlierRule(neighbours=3, distances=(2.9, 0.9, 0.4))
    assert isolated(points, rule).all()
    assert isolated(points, OutlierRule(neighbours=3, distances=(2.9, 0.9, 0.5))).sum() == 3
    assert not isolated(points[:0], rule).any()


def test_outliers_are_in_flops_and_percent():
    """Two subnets, of which one is measured three times: 0.1 points apart, and far from the other."""
    space = QFA_MBV3_GLYPHS
    genes = sample(space, 2, np.random.default_rng(0))[[0, 0, 0, 1]]
    accuracies = np.array([0.5, 0.501, 0.502, 0.5])
    flops = [  # layers in full precision count in full
        sum(layer.macs * min(layer.w_bits, 8) * min(layer.a_bits, 8) for layer in layers_of(space, net))
        for net in subnets_of(space, genes)
    ]
    apart = abs(flops[3] - flops[0]) / 64
    # In units of twice the distance: the mean of (0, 0.5, sqrt(0.25 + 0.1^2)) for the last one, less for the others.
    last = (0.5 + np.sqrt(0.26)) / 3
    for most, found in ((last + 1e-9, [False] * 4), (last - 1e-9, [False] * 3 + [True])):
        rule = OutlierRule(neighbours=3, distances=(most,), flops_unit=2 * apart)
        assert outliers_among(space, genes, accuracies, rule).tolist() == found


def test_a_predictor_is_not_trained_on_outliers_but_scored_on_them():
    rng = np.random.default_rng(0)
    genes, accuracies = sample(TINY, 30, rng), rng.random(30)
    outliers = np.zeros(30, bool)
    outliers[:3] = True
    how = {"quantize": True, "config": PredictorConfig(epochs=3, hidden=16)}
    whole, scores = train_predictor(genes, accuracies, TINY, **how)
    fewer, fewer_scores = train_predictor(genes, accuracies, TINY, **how, outliers=outliers)
    assert scores.n_holdout == fewer_scores.n_holdout == 6
    assert scores.n_train == 24
    assert 21 <= fewer_scores.n_train < 24
    wrong = accuracies.copy()
    wrong[:3] = 1 - wrong[:3]
    held_out_differ, _ = train_predictor(genes, wrong, TINY, **how, outliers=outliers)
    assert (held_out_differ.predict(genes) == fewer.predict(genes)).all()
    assert (whole.predict(genes) != fewer.predict(genes)).any()
    records = [training_record(genes, accuracies, **how, outliers=which) for which in (None, outliers, ~outliers)]
    assert len({json.dumps(record) for record in records}) == 3
    with pytest.raises(UserError, match="leaves 3 of 30 pairs, too few"):
        train_predictor(genes, accuracies, TINY, **how, outliers=~outliers)


@pytest.mark.parametrize("fields", [{"neighbours": 1}, {"flops_unit": 0.0}, {"distances": (0.5, 0.0)}])
def test_a_rule_of_outliers_is_checked(fields):
    with pytest.raises(UserError, match="outliers need"):
        OutlierRule(**fields)
