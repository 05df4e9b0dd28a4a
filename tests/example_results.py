"""Made-up search results, for tests of code that reads them."""

from __future__ import annotations

from pathlib import Path

from apq.experiment import Experiment
from apq.search_result import SearchResult, SubnetChoice

PUBLISHED_BITFUSION = {"accelerator": {}, "table": None}


def found(space, subnet, models="models/digits", **facts):
    """The result of an evolutionary search that chose this subnet, of 1 ms unless `facts` say otherwise."""
    facts = {"cost": 1.0, "quantity": "latency", "unit": "ms", "cost_model": PUBLISHED_BITFUSION, **facts}
    choice = SubnetChoice(space=space, subnet=subnet, models=Path(models))
    return SearchResult(method="evolution", choice=choice, **facts)


def write_found(path, space, subnet, models="models/digits", **facts):
    """The experiment in a folder, with the result of `found`."""
    found(space, subnet, models, **facts).write(experiment := Experiment(path))
    return experiment


def replaced_by(result, folder):
    """The experiment in a folder, which takes the place of what was there."""
    with Experiment(folder).replaced() as new:
        result.write(new)
    return Experiment(folder)


def files_of(folder):
    """The contents of all files under a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
