"""Pairs that a predictor is not trained on, because few others have about their FLOPs and accuracy (QFA's rule)."""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree

from apq.layers import COUNTED_BITS
from apq.space import SearchSpace
from elastic_nn.training.recipe import OutlierRule
from lut.population import PopulationCost


def outliers_among(space: SearchSpace, genes: np.ndarray, accuracies: np.ndarray, rule: OutlierRule) -> np.ndarray:
    """(n,) bool: which pairs (n, genes) with accuracies (n,) from 0 to 1 are outliers."""
    flops = PopulationCost(space, "bitops").predict(genes) / COUNTED_BITS**2
    return isolated(np.stack([flops / rule.flops_unit, 100 * accuracies], axis=1), rule)


def isolated(points: np.ndarray, rule: OutlierRule) -> np.ndarray:
    """(n,) bool: which points (n, 2) the rounds of a rule take away."""
    kept = np.arange(len(points))
    for most in rule.distances:
        if not len(kept):
            break
        near = np.arange(1, 1 + min(rule.neighbours, len(kept)))  # the first is the point itself
        distances, _ = KDTree(points[kept]).query(points[kept], k=near)
        kept = kept[distances.mean(axis=1) <= most]
    found = np.ones(len(points), dtype=bool)
    found[kept] = False
    return found
