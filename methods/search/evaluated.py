"""Measured subnets on disk, so that a killed measurement continues.

They are a `Journal`: one file records what was asked, another has one line a subnet. Further processes write files of
their own, `STEM-RANK.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apq.errors import UserError
from apq.files import Record
from apq.resume import Journal
from apq.space import SearchSpace
from apq.subnet import Subnet, spec_of


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A measured subnet. `index` is its row in its stage of a search, `flops` are MACs, `top1` is from 0 to 1."""

    stage: str
    index: int
    subnet: Subnet
    flops: int
    top1: float

    def record(self, space: SearchSpace) -> Record:
        """One line of the journal."""
        place = {"stage": self.stage, "index": self.index}
        return {**place, **spec_of(space, self.subnet), "flops": self.flops, "top1": self.top1}


@dataclass(frozen=True, kw_only=True)
class EvaluatedStore:
    """Measured subnets of a space, to which one process appends.

    `made_by` is all that their accuracies depend on, as plain data. With `lenient`, lines that describe no subnet of
    this search are ignored; otherwise they are errors.
    """

    space: SearchSpace
    journal: Journal
    made_by: Record
    lenient: bool = False

    def started(self) -> bool:
        """Whether there is a journal of this search. UserError if the records are of another one."""
        return self.journal.holds(self.made_by)

    def start(self) -> None:
        """Start an empty journal; old records are removed."""
        self.journal.start(self.made_by)

    def append(self, evaluated: Evaluated) -> None:
        """Add a subnet; it is on disk when this returns."""
        self.journal.append(evaluated.record(self.space))

    def load(self, stage: str, subnets: Sequence[Subnet]) -> dict[int, float]:
        """Index -> top-1 of the subnets of a stage that are measured. UserError for a line of another search."""
        found: dict[int, float] = {}
        for place, _, record in self.journal.records():
            if isinstance(record, dict) and record.get("stage", stage) != stage:
                continue
            evaluated = self._parsed(record, stage, subnets)
            if evaluated is not None:
                found.setdefault(evaluated.index, evaluated.top1)
            elif not self.lenient:
                raise UserError(f"{place}: not a subnet of this search; {self.journal.remedy}")
        return found

    def _parsed(self, record: Any, stage: str, subnets: Sequence[Subnet]) -> Evaluated | None:
        """The subnet that a line describes; None if it is not the one in `subnets` at its index."""
        try:
            index, flops, top1 = record["index"], int(record["flops"]), float(record["top1"])
            evaluated = Evaluated(stage=stage, index=index, subnet=subnets[index], flops=flops, top1=top1)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            return None
        same = record == evaluated.record(self.space)
        return evaluated if same and index >= 0 and 0 <= top1 <= 1 else None
