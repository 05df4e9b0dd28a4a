"""Fronts of costs and accuracies, and intervals of costs."""

from __future__ import annotations

import numpy as np


def pareto_front(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Indices, by ascending cost, of the points that no other point dominates.

    A point dominates another if it costs no more and is better, or costs less and is as good. Of equal points the first
    is kept.
    """
    order = np.lexsort((-values, costs))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(values[order])[:-1]])
    return order[values[order] > best_before]


def interval_of(flops: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(n,) interval of each cost, -1 outside. The last interval includes its upper edge."""
    at = np.searchsorted(edges, flops, side="right") - 1
    at = np.where(flops == edges[-1], len(edges) - 2, at)
    return np.where((at >= 0) & (at < len(edges) - 1), at, -1)
