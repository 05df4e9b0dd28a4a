"""The measured subnets of a coarse-to-fine search on disk, so that a killed search continues.

In the folder of the experiment, `evaluated.json` records what was asked and `evaluated.jsonl` has one line a subnet.
Further processes write files of their own, `evaluated-RANK.jsonl`, which are merged when the search ends. Beside a
finished search, which stays as it is until another one takes its place, they are `evaluated.state.json` and so on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from apq.checkpoint import load_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record, read_json, write_json, write_jsonl
from apq.resume import Journal
from apq.search_result import read_result
from apq.space import SearchSpace
from methods.search.evaluated import Evaluated, EvaluatedStore

MODE = "coarse_to_fine"
STEM, UNFINISHED = "evaluated", "evaluated.state"
REMEDY = "choose another --exp_name or give --overwrite"


def open_store(
    experiment: Experiment, space: SearchSpace, made_by: Record, *, rank: int, lenient: bool, stem: str = STEM
) -> EvaluatedStore:
    """The measured subnets of an experiment, to which the process of this rank appends."""
    journal = Journal(experiment.path / f"{stem}.json", stem, "coarse-to-fine search", REMEDY, rank)
    return EvaluatedStore(space=space, journal=journal, made_by=made_by, lenient=lenient)


def can_continue(experiment: Experiment, store: EvaluatedStore, *, overwrite: bool) -> bool:
    """Whether there are measurements to continue from. UserError if the folder holds anything else."""
    if overwrite:
        experiment.check_free(overwrite)
        with contextlib.suppress(UserError):
            return store.started() and all(True for _ in store.journal.records())  # reads every line
        return False
    if not store.started():
        experiment.check_free(overwrite)
        return False
    best, last = experiment.best_checkpoint, experiment.last_checkpoint
    if last.exists() or (best.exists() and load_checkpoint(best).get("train", {}) is not None):
        raise UserError(f"{experiment.path} is finetuned; {REMEDY}")
    return True


def begun(experiment: Experiment) -> Record:
    """The settings of the search that an experiment holds, finished or not; {} where there is none.

    A finished one also has "models", the folder of its supernet, and "data", that of its images, if it was given.
    """
    file = experiment.path / f"{STEM}.json"
    if not file.exists():
        return {}
    asked = read_json(file)
    settings = asked.get(MODE) if isinstance(asked, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    found: Record = {key: value for key, value in settings.items() if type(value) in (int, float)}
    if experiment.arch.exists():
        result = read_result(experiment)
        found |= {"models": str(result.found_subnet.models), "data": result.settings.get("data")}
    return found


def write_evaluated(experiment: Experiment, space: SearchSpace, made_by: Record, found: Sequence[Evaluated]) -> None:
    """Write the files of a finished search."""
    write_json(experiment.path / f"{STEM}.json", made_by)
    write_jsonl(experiment.path / f"{STEM}.jsonl", [evaluated.record(space) for evaluated in found])
