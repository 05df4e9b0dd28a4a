"""The record of a front in an experiment: its points, the picked one, and what was measured of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from apq.experiment import Experiment
from apq.genes import subnets_of
from apq.search_result import SearchResult
from lut.cost_model import CostModel, cost_model_from_record
from lut.costs import UNITS
from methods.nsga2.front_finder import Front
from methods.nsga2.front_records import measured_of, with_records
from methods.nsga2.measuring import remove_journal
from methods.nsga2.picking import Bound, pick
from report.plots import plot_predicted_front

PLOT = "front.png"


def picked(searched: SearchResult, front: Front, bounds: tuple[Bound, ...]) -> SearchResult:
    """The result whose choice is the most accurate point within the bounds. UserError if none is within them."""
    names = searched.settings["objectives"]
    accuracy, *costs = front.values.T
    if not np.isnan(front.measured).any():  # then that is better known than predictions
        accuracy = front.measured
    index = pick(bounds, accuracy, dict(zip(names[1:], costs, strict=True)))
    values, space = front.values[index].tolist(), searched.found_subnet.space
    (subnet,) = subnets_of(space, front.genes[index : index + 1])
    chosen = {"pick": ",".join(map(str, bounds)) or None, "picked": dict(zip(names, values, strict=True))}
    return replace(
        searched,
        choice=replace(searched.found_subnet, subnet=subnet),
        cost=values[1],
        predicted_top1=values[0],
        measured_top1=measured_of(front, index),
        settings={**searched.settings, **chosen},
    )


def index_of(front: Front, result: SearchResult) -> int:
    """Index of the chosen point of the front."""
    values = [result.settings["picked"][name] for name in result.settings["objectives"]]
    return int(np.flatnonzero((front.values == values).all(axis=1))[0])


def save(experiment: Experiment, front: Front, result: SearchResult, *, more: bool = False) -> None:
    """Write the experiment: the front, and the `arch` of its chosen point. With `more`, points are measured next."""
    with experiment.replaced(more=more) as new:
        write_pick(new, front, result)


def write_pick(experiment: Experiment, front: Front, result: SearchResult) -> None:
    """Write all that depends on the chosen point."""
    names, accuracy, costs = result.settings["objectives"], front.values[:, 0], front.values[:, 1:].T
    shown = dict(zip(names[1:], costs, strict=True))
    plot_predicted_front(accuracy, shown, UNITS, index_of(front, result), experiment.path / PLOT, front.measured)
    result.write(experiment)


def record_measured(experiment: Experiment, front: Front, result: SearchResult) -> SearchResult:
    """Write the measured values into the experiment. Returns the result with that of its point."""
    result = replace(with_records(front, result), measured_top1=measured_of(front, index_of(front, result)))
    with experiment.edited() as new:
        remove_journal(new)
        write_pick(new, front, result)
    return result


def cost_model_of(experiment: Experiment, result: SearchResult) -> CostModel:
    """The cost model of the search."""
    return cost_model_from_record(result.cost_model, experiment.config)
