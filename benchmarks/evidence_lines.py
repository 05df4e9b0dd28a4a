"""The lines of `benchmarks/evidence.py`: one for each finished run, and which runs are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apq.errors import UserError
from apq.files import Record, read_jsonl
from apq.provenance import this_run
from benchmarks.evidence_setting import Setting

FILE = "runs.jsonl"  # in --out


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a method. `quantity` and `limit` are its budget: a cost, or for predictors the number of pairs."""

    question: str
    seed: int
    method: str
    quantity: str
    limit: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """A finished run. `figures` are its numbers; those of a run without a result have the reason, "failed"."""

    run: Run
    figures: Record

    @property
    def failed(self) -> bool:
        return "failed" in self.figures


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question: its title, its methods in the order of its table, how its runs are listed and measured.

    `setting` gives what its lines record of a `Setting`. `figures` are (key, title, factor, decimals) of the columns of
    its table; the first one is tested and drawn.
    `borrows` says which lines of other questions count here, too.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    figures: tuple[tuple[str, str, float, int], ...]
    runs: Callable[[Setting, int], list[Run]]
    measure: Callable[..., Record]
    setting: Callable[..., Record] = Setting.record
    borrows: Callable[[Run], bool] = lambda run: False

    def lines(self, lines: Iterable[Line]) -> list[Line]:
        """The lines that belong to the question."""
        return [line for line in lines if line.run.question == self.name or self.borrows(line.run)]


def as_record(run: Run, figures: Record, setting: Record) -> Record:
    """A line as plain data: question, seed, method, budget, figures, setting, versions."""
    origin = this_run()
    return {
        "question": run.question,
        "seed": run.seed,
        "method": run.method,
        "budget": {"quantity": run.quantity, "limit": run.limit},
        "figures": figures,
        "setting": setting,
        "versions": {**origin.versions, "commit": origin.commit},
        "date": origin.date,
    }


def read_lines(folder: Path, settings: Record) -> dict[Run, Line]:
    """The finished runs of a folder. UserError where a line's setting is not that of its question in `settings`."""
    found: dict[Run, Line] = {}
    for record in read_jsonl(folder / FILE):
        if record["setting"] != settings.get(record["question"], record["setting"]):
            raise UserError(f"{folder / FILE} has runs of another setting of {record['question']}: give another --out")
        plain = {key: record[key] for key in ("question", "seed", "method")}
        run = Run(**plain, **record["budget"])
        found[run] = Line(run=run, figures=record["figures"])
    return found


def seeds_of(lines: Sequence[Line]) -> list[int]:
    """The seeds in order."""
    return sorted({line.run.seed for line in lines})


def budgets_of_lines(lines: Sequence[Line]) -> list[tuple[str, float]]:
    """The budgets, quantity after quantity, from tight to loose."""
    quantities = list(dict.fromkeys(line.run.quantity for line in lines))
    found = {(line.run.quantity, line.run.limit) for line in lines}
    return sorted(found, key=lambda budget: (quantities.index(budget[0]), budget[1]))
