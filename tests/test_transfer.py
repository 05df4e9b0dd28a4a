"""Fronts judged in other supernets: means and gaps by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from report.architectures import Architectures
from report.transfer import common_range, compare_fronts, fronts_in, mean_lead, mean_of_steps


def architectures(flops, **top1):
    flops = np.array(flops, float)
    return Architectures("random", np.ones((len(flops), 1), int), flops, {k: np.array(v) for k, v in top1.items()})


def test_mean_of_steps_by_hand():
    x, y = np.array([1.0, 2.0, 4.0]), np.array([0.1, 0.2, 0.6])
    assert mean_of_steps(x, y, 1, 4) == pytest.approx((0.1 * 1 + 0.2 * 2) / 3)
    assert mean_of_steps(x, y, 1.5, 5) == pytest.approx((0.1 * 0.5 + 0.2 * 2 + 0.6 * 1) / 3.5)
    assert mean_of_steps(x, y, 2.5, 3) == pytest.approx(0.2)
    assert mean_of_steps(x, y, 2, 2) is None


def test_mean_lead_by_hand():
    """Lines y = x and y = 0.5 over 0 to 1 and 0.5 to 2: over 0.5 to 1 the first is 0 to 0.5 above."""
    one = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    other = (np.array([2.0, 0.5]), np.array([0.5, 0.5]))  # in any order
    assert mean_lead(one, other) == pytest.approx(0.25)
    assert mean_lead(other, one) == pytest.approx(-0.25)
    twice = (np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.5, 1.5]))  # two points at 1, with the mean 1
    assert mean_lead(twice, other) == pytest.approx(0.25)
    assert mean_lead(one, (np.array([1.0, 2.0]), np.ones(2))) is None


@settings(max_examples=30)
@given(st.integers(0, 999))
def test_mean_lead_is_that_of_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    curves = [(np.sort(rng.random(n)), rng.random(n)) for n in (6, 9)]
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if high - low < 0.1:
        return
    grid = np.linspace(low, high, 20_001)
    first, second = (np.interp(grid, x, y) for x, y in curves)
    assert mean_lead(*curves) == pytest.approx((first - second).mean(), abs=5e-3)


def test_fronts_judged_in_each_supernet_by_hand():
    """Float front: all but the third. 2-bit front: 0, 2, 4, so that 1 and 3 are bad choices there."""
    found = architectures([1, 2, 2, 3, 4], real=[0.5, 0.6, 0.55, 0.7, 0.8], few=[0.3, 0.31, 0.4, 0.35, 0.5])
    fronts = fronts_in(found)
    assert {name: front.tolist() for name, front in fronts.items()} == {"real": [0, 1, 3, 4], "few": [0, 2, 4]}
    assert common_range(found, fronts) == (1, 4)
    rows = {(row.judged_in, row.found_in): row for row in compare_fronts(found, fronts)}
    assert rows["few", "few"].top1 == pytest.approx((0.3 + 0.4 + 0.4) / 3)
    assert rows["few", "real"].top1 == pytest.approx((0.3 + 0.31 + 0.35) / 3)
    assert rows["few", "real"].gap == pytest.approx((0.09 + 0.05) / 3)
    assert rows["real", "few"].gap == pytest.approx((0.05 + 0.15) / 3)
    assert (rows["real", "real"].gap, rows["few", "few"].gap_at_accuracy) == (0, 0)
    # At the same float accuracy, 2-bit top-1: (0.5, 0.3), (0.55, 0.4), (0.8, 0.5) over (0.5, 0.3), (0.6, 0.31),
    # (0.7, 0.35), (0.8, 0.5). Trapezoids of the lead at 0.5, 0.55, 0.6, 0.7, 0.8: 0, 0.095, 0.11, 0.11, 0.
    area = 0.05 * 0.0475 + 0.05 * 0.1025 + 0.1 * 0.11 + 0.1 * 0.055
    assert rows["few", "real"].gap_at_accuracy == pytest.approx(area / 0.3)


def test_fronts_without_common_macs_have_no_gap():
    found = architectures([1, 2], real=[0.9, 0.1], few=[0.1, 0.9])
    fronts = {"real": np.array([0]), "few": np.array([1])}
    rows = compare_fronts(found, fronts)
    assert {(row.top1, row.gap, row.gap_at_accuracy) for row in rows} == {(None, None, None)}
