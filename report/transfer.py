"""Fronts found in one supernet and judged in another: is it best to search where one deploys? (OQA, appendix A.3)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid

from apq.fronts import pareto_front
from report.architectures import Architectures


@dataclass(frozen=True, kw_only=True)
class TransferRow:
    """The front that was found in one supernet, in the supernet `judged_in`.

    Attributes:
        top1: mean top-1 (0 to 1) in `judged_in` of the architecture that the front offers for a budget of MACs, over
            budgets in the common range of all fronts. None where there is no such range.
        gap: what the front of `judged_in` itself has more.
        gap_at_accuracy: what it has more at the same accuracy in `found_in`, over the accuracies that both have.
    """

    found_in: str
    judged_in: str
    top1: float | None
    gap: float | None
    gap_at_accuracy: float | None


def fronts_in(found: Architectures) -> dict[str, np.ndarray]:
    """The indices of each supernet's front of top-1 over MACs, by ascending MACs."""
    return {name: pareto_front(found.flops, top1) for name, top1 in found.top1.items()}


def common_range(found: Architectures, fronts: dict[str, np.ndarray]) -> tuple[float, float]:
    """The MACs from which and to which all fronts have points. The first is above the second where there are none."""
    ends = [found.flops[front[[0, -1]]] for front in fronts.values()]
    return float(max(end[0] for end in ends)), float(min(end[1] for end in ends))


def compare_fronts(found: Architectures, fronts: dict[str, np.ndarray]) -> list[TransferRow]:
    """Judge each front in each supernet."""
    low, high = common_range(found, fronts)
    rows = []
    for judged_in, top1 in found.top1.items():
        means = {name: mean_of_steps(found.flops[front], top1[front], low, high) for name, front in fronts.items()}
        own = means[judged_in]
        for found_in, mean in means.items():
            x = found.top1[found_in]
            lead = mean_lead(*((x[fronts[name]], top1[fronts[name]]) for name in (judged_in, found_in)))
            gap = None if own is None or mean is None else own - mean
            rows.append(TransferRow(found_in=found_in, judged_in=judged_in, top1=mean, gap=gap, gap_at_accuracy=lead))
    return rows


def mean_of_steps(x: np.ndarray, y: np.ndarray, low: float, high: float) -> float | None:
    """Mean over low to high of the step function that is y[i] from the ascending x[i] on; None if high <= low.

    >>> mean_of_steps(np.array([0.0, 1.0]), np.array([2.0, 6.0]), 0.0, 4.0)
    5.0
    """
    if high <= low:
        return None
    knots = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    values = y[np.searchsorted(x, knots[:-1], side="right") - 1]
    return float((values * np.diff(knots)).sum() / (high - low))


def mean_lead(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Mean of how far the curve through points (x, y) is above another one, over the range of x that both have.

    The curves are straight between points. Points of equal x count as one, with their mean. None without such a range.
    """
    curves = [_curve(*points) for points in (one, other)]
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if high <= low:
        return None
    inside = np.concatenate([x[(x > low) & (x < high)] for x, _ in curves])
    knots = np.unique(np.concatenate([[low], inside, [high]]))
    first, second = (np.interp(knots, x, y) for x, y in curves)
    return float(trapezoid(first - second, knots) / (high - low))


def _curve(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, at = np.unique(x, return_inverse=True)
    return distinct, np.bincount(at, weights=y) / np.bincount(at)


def table_of(rows: list[TransferRow]) -> list[tuple[str, ...]]:
    """The rows as text. Gaps are in points."""
    shown = [("judged in", "front of", "top-1", "gap", "gap at its accuracy")]
    for row in rows:
        top1 = "-" if row.top1 is None else f"{row.top1:.2%}"
        gaps = ("-" if gap is None else f"{100 * gap:.2f}" for gap in (row.gap, row.gap_at_accuracy))
        shown.append((row.judged_in, row.found_in, top1, *gaps))
    return shown
