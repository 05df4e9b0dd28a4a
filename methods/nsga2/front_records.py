"""Fronts as plain records of a search result, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.genes import genes_of, subnets_of
from apq.search_result import SearchResult, read_result
from apq.space import SearchSpace
from apq.subnet import spec_of, subnet_from_spec
from methods.nsga2.config import Nsga2Config
from methods.nsga2.front_finder import Front

MODE = "nsga2"


def records_of(space: SearchSpace, names: Sequence[str], front: Front) -> list[Record]:
    """The points of a front as records: the objectives by name, `arch` and `policy`."""
    return [
        {"objectives": dict(zip(names, values, strict=True)), **spec_of(space, subnet)}
        for values, subnet in zip(front.values.tolist(), subnets_of(space, front.genes), strict=True)
    ]


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
        if not subnets:
            raise UserError("it has no points")
    except (UserError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{experiment.front} is not the front of a search: {error}") from error
    return Front(genes=genes_of(space, subnets), values=np.array(values), history=list(result.history)), result
