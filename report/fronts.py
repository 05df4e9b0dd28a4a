"""Shapes of the subnets that coarse-to-fine searches measured: how deep they are, shallow and fat or deep and slim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, read_jsonl
from apq.space import SearchSpace
from apq.subnet import Subnet, subnet_from_spec


@dataclass(frozen=True)
class Shapes:
    """Subnets by their shape: depth of every stage, mean expansion of the blocks that run, and what was measured."""

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
    """One interval of FLOPs: the number of subnets of each shape and their mean top-1, None where there are none."""

    flops_from: float
    flops_to: float
    n: int
    n_shallow_fat: int
    n_deep_slim: int
    shallow_fat: float | None
    deep_slim: float | None


def shapes_of(space: SearchSpace, records: Sequence[Mapping[str, Any]]) -> Shapes:
    """The shapes of records of `evaluated.jsonl` or `front.json`."""
    subnets = [subnet_from_spec(space, {**record["arch"], **record["policy"]}) for record in records]
    return Shapes(
        depths=np.array([subnet.d for subnet in subnets]).reshape(len(subnets), len(space.stages)),
        expansion=np.array([mean_expansion(space, subnet) for subnet in subnets]),
        flops=np.array([record["flops"] for record in records], dtype=np.float64),
        top1=np.array([record["top1"] for record in records], dtype=np.float64),
    )


def mean_expansion(space: SearchSpace, subnet: Subnet) -> float:
    """Mean expansion ratio of the blocks that run."""
    return float(np.mean([subnet.e[slot.index] for slot in subnet.running_slots(space)]))


def depth_counts(depths: np.ndarray, choices: Sequence[int]) -> list[int]:
    """Count the subnets of each depth."""
    return [int((depths == choice).sum()) for choice in choices]


def compare_shapes(shapes: Shapes, edges: np.ndarray) -> list[ShapeRow]:
    """Compare shallow-fat with deep-slim subnets in each interval of FLOPs between `edges`.

    Shallow-fat subnets are below the interval's median total depth and above its median mean expansion; deep-slim ones
    are above the first and below the second. Subnets on a median count as neither.
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
    """Mean top-1 by which shallow-fat subnets are better, over the intervals that have both shapes."""
    pairs = [(row.shallow_fat, row.deep_slim) for row in rows]
    return _mean(np.array([fat - slim for fat, slim in pairs if fat is not None and slim is not None]))


def load_front(experiment: Experiment) -> tuple[SearchSpace, Shapes]:
    """The front of a coarse-to-fine experiment; UserError where it has none."""
    return _load(experiment, experiment.front, "front")


def load_coarse(experiment: Experiment) -> tuple[SearchSpace, Shapes, np.ndarray]:
    """The coarse subnets of an experiment and the edges of their intervals of FLOPs; UserError where it has none."""
    space, shapes = _load(experiment, experiment.evaluated, "coarse")
    try:
        settings = experiment.load_config()["coarse_to_fine"]
        return space, shapes, np.linspace(settings["flops_min"], settings["flops_max"], settings["intervals"] + 1)
    except (KeyError, TypeError) as error:
        raise UserError(f"{experiment.config} is not of a coarse-to-fine search") from error


def _load(experiment: Experiment, file: Path, what: str) -> tuple[SearchSpace, Shapes]:
    space = experiment.load_space()
    if not file.exists():
        raise UserError(f"{experiment.path} has no {file.name}: search with search.py --mode coarse_to_fine first")
    records = read_json(file) if what == "front" else read_jsonl(file)
    try:
        records = [record for record in records if what == "front" or record["stage"] == what]
        if not records:
            raise UserError("it has no subnets")
        return space, shapes_of(space, records)
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not of a coarse-to-fine search: {error}") from error


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
