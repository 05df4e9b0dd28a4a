"""The choice of bits by integer programming, against all choices of small tables."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from methods.sensitivity.allocation import allocate


def best_of_all(losses, costs, budget):
    """The least loss of all choices within the budget; inf where there is none."""
    best = np.inf
    for choice in itertools.product(*(range(row.size) for row in losses)):
        rows = np.arange(len(losses)), list(choice)
        if costs[rows].sum() <= budget:
            best = min(best, losses[rows].sum())
    return best


@st.composite
def tables(draw):
    """Tables of up to 4 groups and 5 options, with equal numbers, negative losses and forbidden options, and a budget
    that is often exactly the cost of a choice, or just below it."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = 10.0 ** draw(st.integers(-6, 9))
    whole = draw(st.booleans())
    costs = size * (rng.integers(0, 6, shape) if whole else rng.random(shape))
    losses = 10.0 ** draw(st.integers(-8, 2)) * (rng.integers(-3, 6, shape) if whole else rng.normal(size=shape))
    costs[rng.random(shape) < 0.2] = np.inf
    costs[:, 0] = np.where(np.isfinite(costs).any(axis=1), costs[:, 0], size)
    taken = np.array([rng.choice(np.flatnonzero(np.isfinite(row))) for row in costs])
    exact = costs[np.arange(shape[0]), taken].sum()
    nearly = draw(st.sampled_from([1.0, 1 - 1e-15, 1 - 1e-9, 1 - 1e-7, 1 + 1e-7, 1.3]))
    return losses, costs, float(exact * nearly)


@settings(max_examples=300)
@given(tables())
def test_equals_the_best_of_all_choices(table):
    losses, costs, budget = table
    expected = best_of_all(losses, costs, budget)
    if np.isinf(expected):
        with pytest.raises(UserError, match="below the cheapest choice"):
            allocate(losses, costs, budget)
        return
    rows = np.arange(len(losses)), allocate(losses, costs, budget)
    assert costs[rows].sum() <= budget
    scale = np.abs(losses[np.isfinite(costs)]).max()
    assert losses[rows].sum() <= expected + 1e-9 * scale


def test_by_hand():
    """Both layers at most bits cost 8. Within 5 one stays: the one that would lose more."""
    losses, costs = np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[1.0, 4.0], [1.0, 4.0]])
    assert allocate(losses, costs, 5.0).tolist() == [0, 1]
    assert allocate(losses, costs, 8.0).tolist() == [1, 1]
    assert allocate(losses, costs, 4.999).tolist() == [0, 0]


def test_a_choice_over_the_budget_by_less_than_the_solver_sees_is_not_taken():
    """The better choices are over the budget by parts in 1e12."""
    losses = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    costs = np.array([[0.5, 0.5 - 1e-12, 0.25], [0.5, 0.5 - 1e-12, 0.25]])
    assert sum(allocate(losses, costs, 1 - 2e-12)) == 2
    assert allocate(losses, costs, 1.0).tolist() == [0, 0]


def test_of_equal_options_the_last_is_taken():
    assert allocate(np.zeros((3, 4)), np.ones((3, 4)), 3.0).tolist() == [3, 3, 3]


def test_costs_of_nothing():
    assert allocate(np.array([[1.0, 0.0]]), np.array([[0.0, 0.0]]), 0.0).tolist() == [1]


def test_endless_choices_over_the_budget_by_rounding():
    """Of 12 equal groups any four may have the dear option, by whole numbers. The budget is below that by rounding."""
    losses, costs = np.tile([9.0, 0.0], (12, 1)), np.tile([1.0, 3.0], (12, 1))
    assert allocate(losses, costs, 20.0).sum() == 4
    assert allocate(losses, costs, 20.0 - 4e-15).sum() == 3


def test_the_solver_prints_nothing(capfd):
    """HiGHS prints a line of debugging while it solves this one."""
    w, a = (grid.ravel() for grid in np.meshgrid(np.arange(2, 9), np.arange(2, 9), indexing="ij"))
    rng = np.random.default_rng(11)
    losses = rng.lognormal(size=(22, 1)) * 4.0**-w + rng.lognormal(size=(22, 1)) * 4.0**-a
    losses += 1e-4 * rng.normal(size=(22, 49))
    costs = rng.integers(9, 9000, (22, 1)) * w * 1.0
    print("before")
    allocate(losses, costs, 0.4 * costs.max(axis=1).sum())
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")


def test_a_large_network_takes_seconds():
    """150 layers, 49 pairs of bits each, as in ResNet-152, with losses and costs that fall and rise with the bits."""
    rng = np.random.default_rng(0)
    w, a = (grid.ravel() for grid in np.meshgrid(np.arange(2, 9), np.arange(2, 9), indexing="ij"))
    losses = rng.lognormal(size=(150, 1)) * 4.0**-w + rng.lognormal(size=(150, 1)) * 4.0**-a
    losses += 1e-5 * rng.normal(size=losses.shape)
    costs = rng.lognormal(size=(150, 1)) * w * a
    started = time.monotonic()
    taken = allocate(losses, costs, 0.5 * costs[:, -1].sum())
    assert time.monotonic() - started < 60
    assert costs[np.arange(150), taken].sum() <= 0.5 * costs[:, -1].sum()
