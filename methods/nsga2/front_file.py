"""The front of an experiment: `front.json`, a list of points by ascending first cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, read_jsonl, write_json
from apq.genes import genes_of, subnets_of
from apq.space import SearchSpace
from apq.subnet import spec_of, subnet_from_spec
from methods.nsga2.front_finder import Front

MODE = "nsga2"


def save_front(experiment: Experiment, space: SearchSpace, names: Sequence[str], front: Front) -> None:
    """Write `front.json`: the objectives by name, `arch` and `policy` of each point."""
    points = [
        {"objectives": dict(zip(names, values, strict=True)), **spec_of(space, subnet)}
        for values, subnet in zip(front.values.tolist(), subnets_of(space, front.genes), strict=True)
    ]
    write_json(experiment.front, points)


def has_front(experiment: Experiment) -> bool:
    """Whether the experiment holds a finished search by NSGA-II."""
    return experiment.front.exists() and experiment.arch.exists() and experiment.load_config().get("mode") == MODE


def load_front(experiment: Experiment) -> tuple[Front, dict[str, Any]]:
    """The front of a finished experiment and its config; UserError where it has none."""
    if experiment.front.exists() and experiment.arch.exists() and not has_front(experiment):
        raise UserError(f"the front of {experiment.path} is not of --mode {MODE}: it takes budgets as --constraint")
    if not has_front(experiment):
        raise UserError(f"{experiment.path} has no front: search with search.py --mode {MODE} first")
    space, config = experiment.load_space(), experiment.load_config()
    try:
        points = read_json(experiment.front)
        subnets = [subnet_from_spec(space, {**point["arch"], **point["policy"]}) for point in points]
        values = [[float(point["objectives"][name]) for name in config["objectives"]] for point in points]
        if not points:
            raise UserError("it has no points")
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{experiment.front} is not the front of a search: {error}") from error
    return Front(
        genes=genes_of(space, subnets), values=np.array(values), history=read_jsonl(experiment.history)
    ), config
