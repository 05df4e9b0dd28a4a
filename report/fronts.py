"""Shapes of the subnets of coarse-to-fine searches: depths, shallow-fat against deep-slim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apq.bounds import is_number, is_whole
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record, read_jsonl
from apq.search_result import SearchResult, read_result
from apq.space import SearchSpace
from apq.subnet import Subnet, subnet_from_spec

EVALUATED = "evaluated.jsonl"  # of a coarse-to-fine search
MOST_INTERVALS = 1 << 16  # of MACs, far above those of any search


@dataclass(frozen=True)
class Shapes:
    """Depths of the stages and mean expansion of subnets, with their MACs (`flops`) and top-1."""

    depths: np.ndarray  # (n, stages)
    expansion: np.ndarray  # (n,)
    flops: np.ndarray  # (n,)
    top1: np.ndarray  # (n,)

    @property
    def total_depth(self) -> np.ndarray:
        """(n,) blocks that run."""
        return self.depths.sum(axis=1)


@dataclass(frozen=True, kw_only=True)
class ShapeRow:
    """One interval of MACs: the number of subnets of each shape and their mean top-1, None where there are none."""

    flops_from: float
    flops_to: float
    n: int
    n_shallow_fat: int
    n_deep_slim: int
    shallow_fat: float | None
    deep_slim: float | None


def shapes_of(space: SearchSpace, records: Sequence[Record]) -> Shapes:
    """The shapes of the subnets in records of `evaluated.jsonl` or `front.json`."""
    subnets = [subnet_from_spec(space, {**record["arch"], **record["policy"]}) for record in records]
    return Shapes(
        depths=np.array([subnet.d for subnet in subnets]).reshape(len(subnets), len(space.stages)),
        expansion=np.array([mean_expansion(space, subnet) for subnet in subnets]),
        flops=np.array([record["flops"] for record in records], dtype=np.float64),
        top1=np.array([record["top1"] for record in records], dtype=np.float64),
    )


def mean_expansion(space: SearchSpace, subnet: Subnet) -> float:
    """Mean expansion of the blocks that run."""
    return float(np.mean([subnet.e[slot.index] for slot in subnet.running_slots(space)]))


def depth_counts(depths: np.ndarray, choices: Sequence[int]) -> list[int]:
    """Count the subnets at each depth."""
    return [int((depths == choice).sum()) for choice in choices]


def compare_shapes(shapes: Shapes, edges: np.ndarray) -> list[ShapeRow]:
    """Compare shallow-fat with deep-slim subnets in each interval of MACs between `edges`.

    Shallow-fat subnets are below the median total depth of the interval and above its median mean expansion. Deep-slim
    ones are above the former and below the latter. Subnets on a median are neither.
    """
    rows, last = [], len(edges) - 2
    for i, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        inside = (shapes.flops >= low) & ((shapes.flops < high) | ((i == last) & (shapes.flops <= high)))
        depth, expansion, top1 = shapes.total_depth[inside], shapes.expansion[inside], shapes.top1[inside]
        deeper, fatter = (np.sign(x - np.median(x)) if len(x) else x for x in (depth, expansion))
        fat, slim = (deeper < 0) & (fatter > 0), (deeper > 0) & (fatter < 0)
        rows.append(
            ShapeRow(
                flops_from=low,
                flops_to=high,
                n=int(inside.sum()),
                n_shallow_fat=int(fat.sum()),
                n_deep_slim=int(slim.sum()),
                shallow_fat=_mean(top1[fat]),
                deep_slim=_mean(top1[slim]),
            )
        )
    return rows


def mean_advantage(rows: Sequence[ShapeRow]) -> float | None:
    """Mean advantage in top-1 of shallow-fat subnets, over the intervals that have both shapes; None if none has."""
    pairs = [(row.shallow_fat, row.deep_slim) for row in rows]
    return _mean(np.array([fat - slim for fat, slim in pairs if fat is not None and slim is not None]))


def load_front(experiment: Experiment) -> tuple[SearchSpace, Shapes]:
    """The space and front of a coarse-to-fine experiment. UserError where there is none."""
    result = read_result(experiment)
    return result.found_subnet.space, _shapes_in(experiment.front, result, result.front)


def load_coarse(experiment: Experiment) -> tuple[SearchSpace, Shapes, np.ndarray]:
    """The space and coarse subnets of an experiment, and the edges of the intervals. UserError where it has none."""
    result, file = read_result(experiment), experiment.path / EVALUATED
    shapes = _shapes_in(file, result, read_jsonl(file) if file.exists() else None, stage="coarse")
    try:
        settings = result.settings["coarse_to_fine"]
        low, high, intervals = (settings[key] for key in ("flops_min", "flops_max", "intervals"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{experiment.config} is not from a coarse-to-fine search") from error
    if not (is_number(low, 0) and is_number(high, low) and is_whole(intervals, 1, MOST_INTERVALS)):
        raise UserError(f"{experiment.config}: its intervals of MACs are not those of a coarse-to-fine search")
    edges = np.linspace(low, high, intervals + 1)
    return result.found_subnet.space, shapes, edges


def _shapes_in(file: Path, result: SearchResult, records: Sequence[Record] | None, stage: str | None = None) -> Shapes:
    """The shapes of the records of a file (None: it does not exist), optionally those of one stage alone."""
    if records is None:
        raise UserError(f"{file.parent} has no {file.name}: search with search.py --mode coarse_to_fine first")
    try:
        if stage is not None:
            records = [record for record in records if record["stage"] == stage]
        if not records:
            raise UserError("it has no subnets")
        return shapes_of(result.found_subnet.space, records)
    except (UserError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is not from a coarse-to-fine search: {error}") from error


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
