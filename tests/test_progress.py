"""Progress of long work: on a terminal a bar that starts where earlier runs ended, in a log a line now and then."""

from __future__ import annotations

import io

import pytest
import torch

from elastic_nn.training import progress
from elastic_nn.training.progress import Progress
from elastic_nn.training.session import Execution, Session


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_on(stream, monkeypatch, **times):
    monkeypatch.setattr("sys.stderr", stream)
    for name, seconds in times.items():
        monkeypatch.setattr(progress, name, seconds)
    return stream


def session(**options):
    return Session(splits=None, device=torch.device("cpu"), progress=True, **options)


def test_a_resumed_bar_starts_at_the_epochs_that_are_done(monkeypatch):
    terminal = shown_on(Terminal(), monkeypatch)
    assert list(session().bar(range(9, 15), "finetune")) == [9, 10, 11, 12, 13, 14]
    assert " 9/15 " in terminal.getvalue()
    assert " 0/" not in terminal.getvalue()
    assert " 15/15 " in terminal.getvalue()


def test_a_log_gets_lines_now_and_then_and_one_at_the_end(monkeypatch):
    log = shown_on(io.StringIO(), monkeypatch, LOG_SECONDS=0.0, WORTH_A_LINE=0.0)
    with Progress(what="search", total=4, done=1, unit="episode") as bar:
        for top1 in ("0.5", "0.6", "0.7"):
            bar.update(top1=top1)
    lines = log.getvalue().splitlines()
    assert [line.split(", ")[:2] for line in lines] == [
        ["search: episode 2 of 4", "top1 0.5"],
        ["search: episode 3 of 4", "top1 0.6"],
        ["search: episode 4 of 4", "top1 0.7"],
        ["search: episode 4 of 4", "top1 0.7"],
    ]
    assert lines[-1].endswith("done in 0 s")


def test_stages_end_with_a_line_each(monkeypatch):
    log = shown_on(io.StringIO(), monkeypatch, WORTH_A_LINE=0.0)
    with Progress(what="architecture") as bar:
        for stage, n in (("architecture", 2), ("pruning", 3), ("bits", 1)):
            for _ in range(n):
                bar.start(stage)
                bar.update()
    lines = [line.split(",")[0] for line in log.getvalue().splitlines()]
    assert lines == ["architecture: step 2", "pruning: step 3", "bits: step 1"]


def test_short_work_and_other_processes_are_silent(monkeypatch):
    log = shown_on(io.StringIO(), monkeypatch)
    list(Progress(range(5), "predictor", 5))
    shown_on(log, monkeypatch, LOG_SECONDS=0.0, WORTH_A_LINE=0.0)
    list(session(execution=Execution(rank=1, world_size=2)).bar(range(3), "finetune"))
    assert log.getvalue() == ""


def test_work_that_fails_has_no_end(monkeypatch):
    log = shown_on(io.StringIO(), monkeypatch, WORTH_A_LINE=0.0)

    def fail():
        with Progress(what="search", total=2) as bar:
            bar.update()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert log.getvalue() == ""
