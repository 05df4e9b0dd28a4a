"""<subnet, accuracy> pairs of a supernet on disk, in `dataset/NetInfo/SPACE/acc` (float) or `acc_quant`.

Architectures that `report.analyse` measures in several supernets are pairs too, in `SPACE/GROUP/SUPERNET`.

`meta.json` records how they were gathered; `pairs.jsonl` has one line a pair. Further processes write to files of their
own, `pairs-RANK.jsonl`. Pair i depends on the seed and on i only, so a killed run continues with the missing pairs, on
any number of processes. Subnets that searches chose and measured are pairs too, in `acc_quant_measured` beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apq.bounds import is_number, is_whole
from apq.errors import UserError
from apq.files import Record, read_json
from apq.genes import genes_of
from apq.leftovers import sweep
from apq.lock import Lock, locked
from apq.resume import Journal
from apq.space import SearchSpace, space_to_dict
from apq.subnet import Subnet, spec_of, subnet_from_spec

NETINFO = Path("dataset/NetInfo")
MOST_PAIRS = 1 << 31
META = "meta.json"
ADDED = {  # settings of a finetune that earlier versions did not record, with what they did
    "clip_together": False,
    "dropout": 0.0,
    "gamma": 1.0,
    "nesterov": True,
    "schedule": "cosine",
    "warmup_lr": 0.0,
}


@dataclass(frozen=True)
class PairStore:
    """A folder of pairs, to which the process of this rank appends.

    `what` names the work that fills it, and `remedy` says in messages what to do with pairs of other work.
    """

    path: Path
    rank: int = 0
    what: str = "gathering of pairs"
    remedy: str = "give another folder with --netinfo, or remove this one to gather anew"

    def measured(self) -> PairStore:
        """The folder beside this one of subnets that searches chose and measured, in the same way as these pairs."""
        path = self.path.with_name(f"{self.path.name}_measured")
        remedy = f"remove {path} to measure anew"
        return PairStore(path, self.rank, "measurement of subnets by searches", remedy)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        """Hold the folder's lock, and remove what killed writes left there. UserError names another holder."""
        with locked(self.path) as lock:
            sweep(lock.folder, {META}.__contains__)
            yield lock

    def open(self, space: SearchSpace, made_by: Record, n: int) -> list[int]:
        """Prepare to append, and return which pairs of 0 .. n - 1 are missing.

        UserError if the pairs in the folder were gathered in another way than `made_by`.
        """
        if not self.has(space, made_by) and self.rank == 0:
            self._journal.start({"space": space_to_dict(space), **made_by})
        return sorted(set(range(n)) - self._records().keys())

    def has(self, space: SearchSpace, made_by: Record) -> bool:
        """Whether there are pairs that were gathered as `made_by` says. UserError for pairs of another way."""
        return self._journal.holds({"space": space_to_dict(space), **made_by}, _with_added)

    def made_by(self) -> Record:
        """What the pairs depend on besides the space, as it was recorded. UserError where there are none."""
        meta = read_json(self._meta_file())
        if not isinstance(meta, dict):
            raise UserError(f"{self._meta_file()} must hold an object; {self.remedy}")
        return {key: value for key, value in meta.items() if key != "space"}

    def quantizer(self) -> str | None:
        """The name of the quantizer that the pairs were gathered with; None where it is not recorded."""
        found = self.made_by().get("quantizer") if self._journal.asked_file.exists() else None
        return found if isinstance(found, str) else None

    def next_index(self) -> int:
        """The index after all those of pairs that are there."""
        return max(self._records(), default=-1) + 1

    def append(self, space: SearchSpace, index: int, subnet: Subnet, accuracy: float) -> None:
        """Add pair `index` with its top-1, 0 to 1; it is on disk when this returns."""
        self._journal.append({"index": index, **spec_of(space, subnet), "accuracy": accuracy})

    def load(self, space: SearchSpace, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Genes (n, genes) and accuracies (n,) of all pairs, or of pairs 0 .. n - 1.

        UserError where there are none, where they are of another space, or where a record is not valid.
        """
        meta = read_json(self._meta_file())
        if not isinstance(meta, dict) or meta.get("space") != space_to_dict(space):
            raise UserError(f"{self.path} holds pairs of a space other than {space.name}")
        subnets, accuracies = [], []
        for index, (place, record) in sorted(self._records().items()):
            if n is not None and index >= n:
                break
            try:
                subnets.append(subnet_from_spec(space, {**record["arch"], **record["policy"]}))
                if not is_number(accuracy := record["accuracy"], 0, 1):
                    raise UserError(f"accuracy {str(accuracy)[:20]} is not a number from 0 to 1")
                accuracies.append(float(accuracy))
            except (UserError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{place}: {error}") from error
        return genes_of(space, subnets), np.array(accuracies)

    def _meta_file(self) -> Path:
        if not (file := self._journal.asked_file).exists():
            raise UserError(f"no pairs in {self.path}; gather them with search.py --prepare {self.path.name}")
        return file

    def _records(self) -> dict[int, tuple[str, Record]]:
        """Index -> (file and line in words, record) of every pair. The first pair of an index counts."""
        found: dict[int, tuple[str, Record]] = {}
        for place, line, record in self._journal.records():
            if not isinstance(record, dict) or not is_whole(record.get("index", line), 0, MOST_PAIRS):
                raise UserError(f"{place}: not a pair")
            found.setdefault(record.get("index", line), (place, record))
        return found

    @property
    def _journal(self) -> Journal:
        return Journal(self.path / META, "pairs", self.what, self.remedy, self.rank)


def _with_added(meta: Record) -> Record:
    """The record of pairs as this version writes it."""
    short = meta.get("finetune")
    return {**meta, "finetune": {**ADDED, **short}} if isinstance(short, dict) else meta
