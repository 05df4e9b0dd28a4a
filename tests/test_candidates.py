"""Which candidates are measured: gains, bands and choices by hand and by their properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.search.candidates import APART, Pool, bands_of_costs, choose, gains


def test_gains_by_hand():
    """Measured: 20 % at cost 2, 50 % at cost 3, 40 % at cost 5. In no order, since an archive has none."""
    top1, paid = np.array([0.4, 0.2, 0.5]), np.array([5.0, 2.0, 3.0])
    costs = np.array([1.0, 2.0, 2.9, 3.0, 5.0, 9.0])
    # Below cost 2 nothing is measured: compared with the least accurate, 20 %. At cost 5 the one of cost 3 is better.
    best = [0.2, 0.2, 0.2, 0.5, 0.5, 0.5]
    assert gains(np.full(6, 0.6), costs, top1, paid) == pytest.approx(0.6 - np.array(best))
    assert gains(np.full(6, 0.6), costs, np.zeros(0), np.zeros(0)) == pytest.approx(np.full(6, 0.6))


values = st.floats(0, 1, allow_subnormal=False)
points = st.lists(st.tuples(values, st.floats(0.001, 1000)), min_size=1, max_size=8)


@given(asked=points, measured=points)
def test_a_gain_is_over_the_best_that_costs_no_more(asked, measured):
    (predicted, costs), (top1, paid) = (np.array(rows).T for rows in (asked, measured))
    for gain, mean, cost in zip(gains(predicted, costs, top1, paid), predicted, costs, strict=True):
        cheaper = top1[paid <= cost]
        assert gain == mean - (cheaper.max() if len(cheaper) else top1.min())


def test_bands_by_hand():
    """Four bands from 1 to 16 end at 2, 4 and 8; a cost on an edge is in the higher one, the highest in the last."""
    costs = np.array([1.0, 1.9, 2.0, 3.9, 4.1, 8.1, 16.0])
    assert bands_of_costs(costs, 4).tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert bands_of_costs(np.array([5.0, 5.0]), 4).tolist() == [0, 0]
    assert bands_of_costs(costs, 1).tolist() == [0] * 7
    assert bands_of_costs(np.array([0.0, 1.0]), 2).tolist() == [0, 1]  # a table may have a cost of nothing


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=20), st.integers(1, 50))
def test_bands_keep_the_order_of_costs(costs, n):
    costs = np.array(costs)
    bands = bands_of_costs(costs, n)
    assert bands.min() == 0
    assert bands.max() == (n - 1 if np.ptp(np.log(np.maximum(costs, np.finfo(float).tiny))) else 0)
    assert (np.diff(bands[np.argsort(costs, kind="stable")]) >= 0).all()


def test_bands_take_turns_and_so_do_gain_and_spread():
    genes = np.arange(6)[:, None] * np.ones((6, 4), dtype=int)  # all differ in four genes: far enough apart
    bands = np.array([0, 0, 0, 1, 1, 1])
    gain, spread = np.array([3.0, 2, 1, 3, 2, 1]), np.array([1.0, 2, 3, 1, 2, 3])
    # Turn 0: band 0 by gain, band 1 by spread; then band 0 by spread, band 1 by gain; the rest.
    assert choose(genes, gain, spread, bands, 6).tolist() == [0, 5, 2, 3, 1, 4]
    assert choose(genes, gain, spread, bands, 6, turn=1).tolist() == [2, 3, 0, 5, 1, 4]
    assert choose(genes, gain, spread, bands, 3).tolist() == [0, 5, 2]
    assert choose(genes, gain, spread, np.zeros(6, dtype=int), 2).tolist() == [0, 2]


def test_a_neighbour_of_a_chosen_one_waits():
    """The second best differs from the best in two genes, fewer than are asked. It comes when the others are taken."""
    assert APART == 3
    genes = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 2, 0], [0, 0, 0, 0]])
    gain = np.array([9.0, 8, 1, 9])
    zeros = np.zeros(4, dtype=int)
    assert choose(genes, gain, gain, zeros, 1).tolist() == [0]
    assert choose(genes, gain, gain, zeros, 2).tolist() == [0, 2]
    assert choose(genes, gain, gain, zeros, 4).tolist() == [0, 2, 1]  # the last is the first once more
    assert choose(genes[:0], gain[:0], gain[:0], zeros[:0], 4).tolist() == []


@given(st.integers(0, 2**32), st.integers(1, 15), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3))
def test_chosen_ones_are_different_and_cover_the_bands(seed, m, n, n_bands, turn):
    rng = np.random.default_rng(seed)
    genes, bands = rng.integers(3, size=(m, 4)), rng.integers(n_bands, size=m)
    gain, spread = rng.random(m), rng.random(m)
    rows = choose(genes, gain, spread, bands, n, turn)
    chosen = genes[rows]
    assert len(rows) == min(n, len(np.unique(genes, axis=0)))
    assert len(np.unique(chosen, axis=0)) == len(rows)
    best_of = {spread[bands == bands[rows[0]]].max(), gain[bands == bands[rows[0]]].max()}
    assert {gain[rows[0]], spread[rows[0]]} & best_of
    if len(np.unique(genes, axis=0)) == m:  # then no band loses its candidates to another one
        assert len(np.unique(bands[rows])) == min(n, len(np.unique(bands)))


def test_the_first_row_is_chosen_before_all_others():
    genes = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    worth = np.array([0.1, 0.9, 0.5, 0.2])
    bands = np.zeros(4, dtype=int)
    assert choose(genes, worth, worth, bands, 2).tolist() == [1, 2]
    assert choose(genes, worth, worth, bands, 2, first=0).tolist() == [0, 1]
    assert choose(genes, worth, worth, bands, 0, first=0).tolist() == []
    pool = Pool(genes=genes, costs=worth, first=2)
    assert pool.take(np.array([1, 2])).first == 1
    assert pool.take(np.array([0, 1])).first is None
