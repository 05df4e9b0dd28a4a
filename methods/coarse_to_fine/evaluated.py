"""The subnets that a coarse-to-fine search measured, on disk: what a killed run and other processes have done stays.

`evaluated.json` of an experiment says what was asked, `evaluated.jsonl` has one line a subnet; each further process
has a file of its own, `evaluated-RANK.jsonl`, until the search ends and all are merged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apq.errors import UserError
from apq.files import append_jsonl, atomic_open, read_json, read_jsonl, write_json
from apq.space import SearchSpace
from apq.subnet import Subnet, spec_of


@dataclass(frozen=True)
class EvaluatedStore:
    """Measured subnets in the folder of an experiment, as the process of this rank sees it.

    With `lenient` a line of another subnet counts as not measured, instead of being an error.
    """

    path: Path
    rank: int = 0
    lenient: bool = False

    @property
    def asked_file(self) -> Path:
        return self.path / "evaluated.json"

    def holds(self, asked: dict[str, Any]) -> bool:
        """Whether there are subnets that were measured with these settings; UserError where with others."""
        if not self.asked_file.exists():
            if any(self._files()):
                raise UserError(f"{self.path} has measured subnets but no {self.asked_file.name}; give --overwrite")
            return False
        found, asked = read_json(self.asked_file), json.loads(json.dumps(asked))
        if found != asked:
            told = found if isinstance(found, dict) else {}
            odd = ", ".join(sorted(key for key in {*told, *asked} if told.get(key) != asked.get(key)))
            raise UserError(
                f"{self.path} holds a coarse-to-fine search with other {odd}; "
                "choose another --exp_name or give --overwrite"
            )
        return True

    def readable(self) -> bool:
        """Whether every file is one of JSON lines; UserError where not."""
        return all(isinstance(read_jsonl(file), list) for file in self._files())

    def start(self, asked: dict[str, Any]) -> None:
        """Begin with nothing measured."""
        for file in self._files():
            file.unlink()
        write_json(self.asked_file, asked)

    def append(self, space: SearchSpace, stage: str, index: int, subnet: Subnet, flops: float, top1: float) -> None:
        """Add subnet `index` of a stage: its MACs, and top-1 as a share."""
        name = f"evaluated-{self.rank}.jsonl" if self.rank else "evaluated.jsonl"
        append_jsonl(self.path / name, record_of(space, stage, index, subnet, flops, top1))

    def load(self, space: SearchSpace, stage: str, subnets: list[Subnet]) -> dict[int, float]:
        """Top-1 of those of a stage's subnets that are measured; UserError where a line is of another subnet."""
        found: dict[int, float] = {}
        for file in self._files():
            for line, record in enumerate(read_jsonl(file)):
                try:
                    if record["stage"] != stage:
                        continue
                    index, top1 = record["index"], float(record["top1"])
                    expected = record_of(space, stage, index, subnets[index], record["flops"], top1)
                    same = record == expected and 0 <= top1 <= 1
                except (KeyError, TypeError, ValueError, IndexError):
                    same = False
                if not same and self.lenient:
                    continue
                if not same:
                    raise UserError(f"{file}, line {line + 1}: not a subnet of this search; give --overwrite")
                found.setdefault(index, top1)
        return found

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("evaluated*.jsonl"))


def record_of(space: SearchSpace, stage: str, index: int, subnet: Subnet, flops: float, top1: float) -> dict[str, Any]:
    """One line of `evaluated.jsonl`."""
    return {"stage": stage, "index": index, **spec_of(space, subnet), "flops": int(flops), "top1": top1}


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write all lines at once."""
    with atomic_open(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
