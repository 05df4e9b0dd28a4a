"""The <subnet, accuracy> pairs of a supernet on disk: `dataset/NetInfo/SPACE/acc` (float) or `acc_quant`.

`meta.json` says what made them; `pairs.jsonl` has one line a pair. Each further process that gathers has a file of its
own, `pairs-RANK.jsonl`. Pair i depends on the seed and i alone, so a run that was killed continues with the pairs that
are missing, on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.files import append_jsonl, read_json, read_jsonl, write_json
from apq.genes import genes_of
from apq.space import SearchSpace, space_to_dict
from apq.subnet import Subnet, spec_of, subnet_from_spec

NETINFO = Path("dataset/NetInfo")


@dataclass(frozen=True)
class PairStore:
    """A folder of pairs, as the process of this rank sees it."""

    path: Path
    rank: int = 0

    def open(self, space: SearchSpace, made_by: dict[str, Any], n: int) -> list[int]:
        """Prepare to append; returns which pairs of 0 .. n - 1 are missing. UserError if they were made differently."""
        meta_file, meta = self.path / "meta.json", {"space": space_to_dict(space), **made_by}
        if meta_file.exists():
            found = read_json(meta_file)
            if not isinstance(found, dict):
                raise UserError(f"{meta_file} must hold an object")
            if found != meta:
                odd = sorted(key for key in {*found, *meta} if found.get(key) != meta.get(key))
                raise UserError(
                    f"{self.path} holds pairs made with other {', '.join(odd)}; give "
                    "--netinfo another folder, or remove this one to gather anew"
                )
        elif self.rank == 0:
            write_json(meta_file, meta)
        return sorted(set(range(n)) - self._records().keys())

    def append(self, space: SearchSpace, index: int, subnet: Subnet, accuracy: float) -> None:
        """Add pair `index`: top-1 accuracy as a share, 0 to 1."""
        name = f"pairs-{self.rank}.jsonl" if self.rank else "pairs.jsonl"
        append_jsonl(self.path / name, {"index": index, **spec_of(space, subnet), "accuracy": accuracy})

    def load(self, space: SearchSpace, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Genes (n, genes) and accuracies (n,) of all pairs or of 0 .. n - 1.

        UserError for none, for another space's or for bad ones.
        """
        meta = read_json(self.path / "meta.json") if (self.path / "meta.json").exists() else None
        if meta is None:
            raise UserError(f"no pairs in {self.path}; gather them with search.py --prepare {self.path.name}")
        if not isinstance(meta, dict) or meta.get("space") != space_to_dict(space):
            raise UserError(f"{self.path} holds pairs of another space than {space.name}")
        subnets, accuracies = [], []
        for index, (place, record) in sorted(self._records().items()):
            if n is not None and index >= n:
                break
            try:
                subnets.append(subnet_from_spec(space, {**record["arch"], **record["policy"]}))
                accuracies.append(float(record["accuracy"]))
                if not 0 <= accuracies[-1] <= 1:
                    raise UserError(f"accuracy {accuracies[-1]} is not a share from 0 to 1")
            except (UserError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{place}: {error}") from error
        return genes_of(space, subnets), np.array(accuracies)

    def _records(self) -> dict[int, tuple[str, dict[str, Any]]]:
        """Every pair by its index, with the place it was read from; of doubles the first."""
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        for file in sorted(self.path.glob("pairs*.jsonl")):
            for line, record in enumerate(read_jsonl(file)):
                place = f"{file}, line {line + 1}"
                if not isinstance(record, dict) or not isinstance(record.get("index", line), int):
                    raise UserError(f"{place}: not a pair")
                found.setdefault(record.get("index", line), (place, record))
        return found
