"""Depths of the subnets on fronts of coarse-to-fine searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apq.errors import UserError
from apq.experiment import Experiment
from apq.search_result import read_result
from apq.space import SearchSpace
from apq.subnet import subnet_from_spec


@dataclass(frozen=True, kw_only=True)
class DepthSection:
    """The number of subnets of each front at each of `depths`, and the mean depth of each front."""

    depths: list[int]
    counts: dict[str, list[int]]
    means: dict[str, float]

    def rows(self, title: str) -> list[tuple[str, ...]]:
        """One row of counts for each depth, and one of means."""
        counts = [
            (f"{title}: {depth}", *(str(of_front[i]) for of_front in self.counts.values()))
            for i, depth in enumerate(self.depths)
        ]
        return [*counts, (f"{title}: mean", *(f"{mean:.2f}" for mean in self.means.values()))]


def depth_section(depths: Mapping[str, np.ndarray]) -> DepthSection:
    """Count the depths (n,) of each front, from the smallest to the largest of all."""
    choices = range(min(int(d.min()) for d in depths.values()), 1 + max(int(d.max()) for d in depths.values()))
    return DepthSection(
        depths=list(choices),
        counts={name: depth_counts(d, choices) for name, d in depths.items()},
        means={name: float(d.mean()) for name, d in depths.items()},
    )


def depth_counts(depths: np.ndarray, choices: Sequence[int]) -> list[int]:
    """Count the subnets at each depth."""
    return [int((depths == choice).sum()) for choice in choices]


def load_front(experiment: Experiment) -> tuple[SearchSpace, np.ndarray]:
    """The space of a coarse-to-fine experiment, and the depths (n, stages) of its front. UserError without a front."""
    result, file = read_result(experiment), experiment.front
    if result.front is None:
        raise UserError(f"{file.parent} has no {file.name}: search with search.py --mode coarse_to_fine first")
    space = result.found_subnet.space
    try:
        if not result.front:
            raise UserError("it has no subnets")
        subnets = [subnet_from_spec(space, {**point["arch"], **point["policy"]}) for point in result.front]
    except (UserError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is not from a coarse-to-fine search: {error}") from error
    return space, np.array([subnet.d for subnet in subnets])
