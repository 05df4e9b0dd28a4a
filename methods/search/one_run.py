"""A run of a search has its experiment for itself, from the first check to the last line that it prints."""

from __future__ import annotations

import argparse
import contextlib
import json
from types import ModuleType

from apq.experiment import Experiment, get_experiment
from apq.processes import first_process, several_processes
from methods import PREPARE, Mode


def run_mode(mode: Mode, command: ModuleType, args: argparse.Namespace) -> None:
    """Run a mode while no other run can write its experiment. UserError names the process of one that does.

    Where the same command was killed after its result was in place, this says so and there is nothing to do.
    """
    if not mode.shares and not first_process():
        return
    if (
        mode is PREPARE or getattr(args, "exp_name", None) is None
    ):  # not a search: it writes other folders, and locks them
        command.run(args)
        return
    experiment = get_experiment(args.exp_name, args.exp_dir)
    with contextlib.ExitStack() as stack:
        if mode.shares and several_processes():
            from apq.device import resolve_device
            from elastic_nn.training.distributed import joined, locked_by_first

            execution = stack.enter_context(joined(resolve_device(args.device)))
            finished = stack.enter_context(locked_by_first(experiment.locked(), execution))
        else:
            finished = stack.enter_context(experiment.locked()).finished
        if not finished:
            command.run(args)
        elif first_process():
            say_finished(experiment, as_json=args.json)


def say_finished(experiment: Experiment, *, as_json: bool) -> None:
    """Print that the run that was killed had finished."""
    if as_json:
        print(json.dumps({"exp_dir": str(experiment.path), "finished": True}))
    else:
        print(f"{experiment.path} is finished: the run was killed after its result was in place")
