"""Fronts as plain records of a search result, and back; points spread over a front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from apq.bounds import is_number
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.genes import genes_of, subnets_of
from apq.search_result import SearchResult, read_result
from apq.space import SearchSpace
from apq.subnet import spec_of, subnet_from_spec
from methods.nsga2.config import Nsga2Config
from methods.nsga2.front_finder import Front

MODE, MEASURED = "nsga2", "measured_accuracy"


def records_of(space: SearchSpace, names: Sequence[str], front: Front) -> list[Record]:
    """The points of a front as records: the objectives by name, `arch`, `policy`, and the measured top-1 (or None)."""
    measured = [None if np.isnan(top1) else top1 for top1 in front.measured.tolist()]
    rows = zip(front.values.tolist(), measured, subnets_of(space, front.genes), strict=True)
    return [
        {"objectives": dict(zip(names, values, strict=True)), MEASURED: top1, **spec_of(space, subnet)}
        for values, top1, subnet in rows
    ]


def spread(n: int, most: int | None) -> list[int]:
    """Indices of at most `most` of n points, evenly from the first to the last; of all for None.

    >>> spread(9, 3)
    [0, 4, 8]
    """
    return np.unique(np.linspace(0, n - 1, n if most is None else min(most, n)).round().astype(int)).tolist()


def measured_of(front: Front, index: int) -> float | None:
    """Measured top-1 of a point; None where it was not measured."""
    return None if np.isnan(front.measured[index]) else float(front.measured[index])


def with_records(front: Front, result: SearchResult) -> SearchResult:
    """The result with the points of the front as they are now."""
    names = result.settings["objectives"]
    return replace(result, front=tuple(records_of(result.found_subnet.space, names, front)))


def has_front(experiment: Experiment) -> bool:
    """Whether the experiment holds a finished search by NSGA-II."""
    return experiment.front.exists() and experiment.arch.exists() and read_result(experiment).method == MODE


def load_front(experiment: Experiment) -> tuple[Front, SearchResult]:
    """The front of a finished experiment, and its result. UserError where there is none."""
    if not (experiment.front.exists() and experiment.arch.exists()):
        raise UserError(f"{experiment.path} has no front: search with search.py --mode {MODE} first")
    result = read_result(experiment)
    if result.method != MODE:
        raise UserError(f"the front of {experiment.path} is not from --mode {MODE}: give a budget with --constraint")
    space = result.found_subnet.space
    try:
        subnets = [subnet_from_spec(space, {**point["arch"], **point["policy"]}) for point in result.front]
        names, _ = result.settings["objectives"], Nsga2Config(**result.settings["nsga2"])
        values = [[float(point["objectives"][name]) for name in names] for point in result.front]
        measured = [_top1(point.get(MEASURED)) for point in result.front]  # earlier versions measured none
        if not subnets:
            raise UserError("it has no points")
    except (UserError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{experiment.front} is not the front of a search: {error}") from error
    front = {"genes": genes_of(space, subnets), "values": np.array(values), "measured": np.array(measured)}
    return Front(**front, history=list(result.history)), result


def _top1(found: Any) -> float:
    """A measured top-1 in a file; NaN for null. UserError for anything else."""
    if found is not None and not is_number(found, 0, 1):
        raise UserError(f"{MEASURED} {str(found)[:20]} is not a number from 0 to 1")
    return np.nan if found is None else float(found)
