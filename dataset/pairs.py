"""The <subnet, accuracy> pairs of a supernet on disk: `dataset/NetInfo/SPACE/acc` (float) or `acc_quant`.

`meta.json` says what made them, `pairs.jsonl` has one line a pair. Pair i depends on the seed and i alone, so a run
that was killed continues at the first line that is missing.
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
    """A folder of pairs."""

    path: Path

    def open(self, space: SearchSpace, made_by: dict[str, Any]) -> int:
        """Prepare to append; returns how many pairs are there. UserError if they were made differently."""
        meta_file, meta = self.path / "meta.json", {"space": space_to_dict(space), **made_by}
        if meta_file.exists():
            found = read_json(meta_file)
            if not isinstance(found, dict):
                raise UserError(f"{meta_file} must hold an object")
            if found != meta:
                odd = sorted(key for key in {*found, *meta} if found.get(key) != meta.get(key))
                raise UserError(f"{self.path} holds pairs made with other {', '.join(odd)}; remove it to gather anew")
        else:
            write_json(meta_file, meta)
        return len(read_jsonl(self.path / "pairs.jsonl"))

    def append(self, space: SearchSpace, subnet: Subnet, accuracy: float) -> None:
        """Add one pair: top-1 accuracy as a share, 0 to 1."""
        append_jsonl(self.path / "pairs.jsonl", {**spec_of(space, subnet), "accuracy": accuracy})

    def load(self, space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
        """Genes (n, genes) and accuracies (n,); UserError for none, for another space's or for bad ones."""
        meta = read_json(self.path / "meta.json") if (self.path / "meta.json").exists() else None
        if meta is None:
            raise UserError(f"no pairs in {self.path}; gather them with search.py --prepare {self.path.name}")
        if not isinstance(meta, dict) or meta.get("space") != space_to_dict(space):
            raise UserError(f"{self.path} holds pairs of another space than {space.name}")
        subnets, accuracies = [], []
        for i, record in enumerate(read_jsonl(self.path / "pairs.jsonl")):
            try:
                subnets.append(subnet_from_spec(space, {**record["arch"], **record["policy"]}))
                accuracies.append(float(record["accuracy"]))
                if not 0 <= accuracies[-1] <= 1:
                    raise UserError(f"accuracy {accuracies[-1]} is not a share from 0 to 1")
            except (UserError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{self.path}/pairs.jsonl, line {i + 1}: {error}") from error
        return genes_of(space, subnets), np.array(accuracies)
