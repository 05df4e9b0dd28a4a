"""The choice of one option a group that costs least in sum within a budget: the multiple-choice knapsack.

HAWQ-V3 (Yao et al., arXiv 2011.10680) chooses bits so. Groups are layers, options their bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from apq.errors import UserError
from apq.fronts import pareto_front

# HiGHS solves to absolute tolerances of 1e-6. The largest loss and the budget become so large that these are far below
# any difference that matters.
SCALE = 1e4
STDOUT = 1  # its file descriptor
# Choices over the budget by less than the solver sees are ruled out one by one. Equal layers may have endless ones:
# after so many the budget is lowered by more than the tolerances, which may miss choices that just fit.
MOST_RULED_OUT, MARGIN = 20, 1e-9


def allocate(losses: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """(n,) option of each group, so that the sum of `losses` is least and that of `costs` at most `budget`.

    `losses` and `costs` are (n, options). Losses are finite; an infinite cost forbids an option. Costs are not
    negative. Of options with equal loss and cost the last is taken. UserError where even the cheapest options are over
    the budget.

    >>> allocate(np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[1.0, 4.0], [1.0, 4.0]]), 5.0)
    array([0, 1])
    """
    if (lowest := float(costs.min(axis=1).sum())) > budget:
        raise UserError(f"the budget of {budget:.6g} is below the cheapest choice, which costs {lowest:.6g}")
    group, option = _useful(losses, np.where(costs <= budget, costs, np.inf))
    cost, loss = costs[group, option], losses[group, option]
    least = np.full(len(losses), np.inf)
    np.minimum.at(least, group, loss)
    loss = loss - least[group]  # none is negative, the choice is the same
    one_each = csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(losses), len(group)))
    c, price = loss / (loss.max() or 1.0) * SCALE, (cost / (budget or 1.0) * SCALE)[None]
    rows = [LinearConstraint(one_each, 1, 1), LinearConstraint(price, -np.inf, SCALE)]
    for _ in range(MOST_RULED_OUT):
        taken = _solve(c, rows)
        if cost[taken].sum() <= budget:
            return option[taken]
        rows.append(LinearConstraint(taken[None].astype(float), -np.inf, len(losses) - 1))
    taken = _solve(c, [rows[0], LinearConstraint(price, -np.inf, SCALE * (1 - MARGIN))])
    if cost[taken].sum() > budget:
        raise UserError(f"no choice of bits within the budget of {budget:.6g} was found: give another one")
    return option[taken]


def _useful(losses: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k,) groups and options that no option of the same group dominates, in the order of the groups."""
    kept = []
    for row, price in zip(losses, costs, strict=True):
        allowed = np.flatnonzero(np.isfinite(price))[::-1]  # so that of equal ones the last is kept
        kept.append(np.sort(allowed[pareto_front(price[allowed], -row[allowed])]))
    return np.repeat(np.arange(len(kept)), [len(options) for options in kept]), np.concatenate(kept)


def _solve(c: np.ndarray, rows: list[LinearConstraint]) -> np.ndarray:
    """(k,) bool: which options are taken, one of each group. UserError where the solver fails."""
    one_each = rows[0].A
    with _without_output():
        found = milp(c, integrality=np.ones_like(c), bounds=Bounds(0, 1), constraints=rows, options={"mip_rel_gap": 0})
    if found.x is None or not (one_each @ (found.x > 0.5) == 1).all():
        raise UserError(f"no choice of bits was found: {found.message}")
    return found.x > 0.5


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Context without the stdout of C: HiGHS prints lines of debugging there, whatever its options say.

    https://github.com/jump-dev/HiGHS.jl/issues/312
    """
    try:
        kept = os.dup(STDOUT)
    except OSError:  # there is no stdout
        yield
        return
    try:
        sys.stdout.flush()
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), STDOUT)
        yield
        ctypes.CDLL(None).fflush(None)  # of C, before its buffer reaches stdout
    finally:
        os.dup2(kept, STDOUT)
        os.close(kept)
