"""Paired comparisons of two methods over the same seeds: difference, test, and what the test could have found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL, POWER = 0.05, 0.8  # of a two-sided test
QUANTILES = 20_000  # of a distribution, in its place


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The differences of two methods over `n` seeds, first minus second.

    Attributes:
        mean, std: of the differences; the standard deviation is that of a sample (n - 1).
        t_test: p of the paired t test; None for fewer than two seeds, or where all differences are equal.
        wilcoxon: p of the signed-rank test; None for fewer than two seeds, or where all differences are zero. That of
            five seeds cannot be below 0.0625.
        least: the smallest true difference that the t test would find (p < 0.05) in 80 % of cases, if differences
            spread as these; None where there is no t test.
    """

    n: int
    mean: float
    std: float
    t_test: float | None
    wilcoxon: float | None
    least: float | None


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two methods on the same seeds: (n,) and (n,), in the same order. ValueError for other shapes or none."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a paired test needs two equal numbers of values, not {a.shape} and {b.shape}")
    differences = a - b
    n, std = len(a), float(np.std(differences, ddof=1)) if len(a) > 1 else 0.0
    spreads = n > 1 and std > 1e-12 * np.abs(a).max()  # beyond rounding
    return Paired(
        n=n,
        mean=float(differences.mean()),
        std=std,
        t_test=float(stats.ttest_rel(a, b).pvalue) if spreads else None,
        wilcoxon=float(stats.wilcoxon(differences).pvalue) if n > 1 and np.any(differences) else None,
        least=least_difference(std, n) if spreads else None,
    )


def least_difference(std: float, n: int, level: float = LEVEL, power: float = POWER) -> float:
    """The true mean difference that a two-sided paired t test of n pairs finds with probability `power`.

    `std` is the standard deviation of the differences. Under a true mean d, t has a noncentral t distribution with
    n - 1 degrees of freedom and noncentrality d sqrt(n) / std.
    """
    degrees = n - 1
    critical = stats.t.ppf(1 - level / 2, degrees)
    # t = (z + noncentrality) / sqrt(v / degrees) with normal z and chi-squared v, whose quantiles stand for it here.
    # scipy's noncentral t is not a number for few degrees and large noncentralities.
    middles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    limits = critical * np.sqrt(stats.chi2.ppf(middles, degrees) / degrees)

    def lacking(noncentrality: float) -> float:
        found = stats.norm.sf(limits - noncentrality) + stats.norm.cdf(-limits - noncentrality)
        return float(found.mean()) - power

    high = 1.0
    while lacking(high) < 0:
        high *= 2
    return float(optimize.brentq(lacking, 0.0, high) * std / np.sqrt(n))
