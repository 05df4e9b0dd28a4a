"""Per-slot tables over genes, in one flat array: what makes cost and the predictor's first layer a gather."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from apq.genes import active, cardinalities
from apq.space import SearchSpace


def gene_column(space: SearchSpace, what: str | int, slot: int = 0) -> int:
    """Column of a slot's kernel ("ks"), width ("e") or bits (an operand kind's index), or of the "resolution"."""
    if what == "resolution":
        return len(cardinalities(space)) - 1
    section = {"ks": 0, "e": 1}[what] if isinstance(what, str) else 2 + what
    return section * len(space.slots) + slot


class GeneTables:
    """Addresses of cells, where every slot has one table an axis group, and all tables lie one after another.

    `axes` names the groups: ("ks", "e") is a table over a slot's kernel and width genes, (0, 2) one over the genes of
    operand kinds 0 and 2; "resolution" may join any group. Cell `size`, behind the last table, is for slots that do
    not run.
    """

    def __init__(self, space: SearchSpace, axes: Sequence[Sequence[str | int]]) -> None:
        self.space = space
        self.axes = [tuple(group) for group in axes]
        counts, n_slots = cardinalities(space), len(space.slots)
        self._slots = np.tile(np.arange(n_slots), len(self.axes))  # (tables,)
        strides = np.zeros((len(counts), len(self._slots)))  # (genes, tables)
        bases, self.shapes = [0], []
        for table, (group, slot) in enumerate((group, slot) for group in self.axes for slot in range(n_slots)):
            columns = [gene_column(space, what, slot) for what in group]
            shape = tuple(int(counts[column]) for column in columns)
            for axis, column in enumerate(columns):
                strides[column, table] = np.prod(shape[axis + 1 :], dtype=np.int64)
            self.shapes.append(shape)
            bases.append(bases[-1] + int(np.prod(shape, dtype=np.int64)))
        self.size = bases.pop()
        self._bases, self._strides = np.array(bases), strides

    def __iter__(self) -> Iterator[tuple[int, int, tuple[int, ...], slice]]:
        """(group, slot, table shape, place in the flat array) of every table, group by group."""
        for table, (start, shape) in enumerate(zip(self._bases, self.shapes, strict=True)):
            group, slot = divmod(table, len(self.space.slots))
            yield group, slot, shape, slice(int(start), int(start) + int(np.prod(shape)))

    def index(self, genes: np.ndarray) -> np.ndarray:
        """(n, tables) int64 cells of a gene matrix."""
        # A float64 product is exact here and, unlike an integer one, runs in BLAS.
        cells = (genes.astype(np.float64) @ self._strides).astype(np.int64) + self._bases  # (n, tables)
        runs = active(self.space, genes)[:, self._slots]
        return np.where(runs, cells, self.size)
