"""The archive of a supernet: subnets that searches chose and measured, for all later searches of that supernet.

It lies beside the pairs, and its subnets are measured as the pairs are. So they can be added to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apq.files import Record
from apq.genes import genes_of, subnets_of
from apq.space import SearchSpace
from dataset.pairs import PairStore
from elastic_nn.training.distributed import by_first, check_agreement, locked_by_first
from elastic_nn.training.session import Execution
from methods.search.measurement import Measurement
from methods.search.sharing import do_missing

DRAWS = ("strata",)


def drawn(made_by: Mapping[str, Any]) -> Record:
    """How the subnets of pairs were drawn, out of all that the pairs depend on."""
    return {key: value for key, value in made_by.items() if key in DRAWS}


def without_draws(made_by: Mapping[str, Any]) -> Record:
    """What the accuracies of pairs depend on, without how their subnets were drawn."""
    return {key: value for key, value in made_by.items() if key not in DRAWS}


def accuracies_of(genes: np.ndarray, known: np.ndarray, top1: np.ndarray) -> np.ndarray:
    """(n,) the accuracies of genes (n, genes) among `known` genes (m, genes) of accuracies (m,); NaN for others."""
    found = {row.tobytes(): accuracy for row, accuracy in zip(known.astype(np.int64), top1, strict=True)}
    return np.array([found.get(row.tobytes(), np.nan) for row in genes.astype(np.int64)], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """Measured subnets of a space. `made_by` is all that their accuracies depend on, as plain data."""

    store: PairStore
    space: SearchSpace
    made_by: Record

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Genes (n, genes) and accuracies (n,) of all that is measured. UserError if it was measured in another way."""
        if not self.store.has(self.space, self.made_by):
            return genes_of(self.space, []), np.zeros(0)
        return self.store.load(self.space)

    def measured(self, genes: np.ndarray) -> np.ndarray:
        """(n,) the accuracies of genes (n, genes); NaN for those that are not measured."""
        return accuracies_of(genes, *self.load())

    def measure(self, measurement: Measurement, genes: np.ndarray, execution: Execution, what: str) -> np.ndarray:
        """(n,) accuracies of distinct genes (n, genes). Those that are missing are measured now, by all processes.

        No other run can add to the archive meanwhile; UserError names the process of one that does.
        """
        with locked_by_first(self.store.locked(), execution):
            by_first(lambda: self.store.open(self.space, self.made_by, 0), execution)
            top1, first = self.measured(genes), self.store.next_index()
            missing = np.flatnonzero(np.isnan(top1)).tolist()
            check_agreement({"measured subnets (their folder must be shared)": [first, missing]}, execution)
            subnets, index_of = subnets_of(self.space, genes), {row: first + i for i, row in enumerate(missing)}

            def measure_one(row: int) -> None:
                accuracy = measurement.top1(subnets[row])
                self.store.append(self.space, index_of[row], subnets[row], accuracy)

            done = set(range(len(genes))) - set(missing)
            do_missing(range(len(genes)), done, measure_one, execution, what=what, unit="subnet")
            return self.measured(genes)
