"""Per-slot tables over genes in one flat array: they turn costs and the predictor's first layer into gathers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from apq.genes import active, cardinalities
from apq.space import SearchSpace


def gene_column(space: SearchSpace, what: str | int, slot: int = 0) -> int:
    """Column of the "resolution", or of a slot's kernel ("ks"), mid channels ("e") or bits (index of the kind)."""
    if what == "resolution":
        return len(cardinalities(space)) - 1
    section = {"ks": 0, "e": 1}[what] if isinstance(what, str) else 2 + what
    return section * len(space.slots) + slot


class GeneTables:
    """Addresses of cells in a flat array that holds, for each group of axes, one table for every slot.

    `axes` are the groups. ("ks", "e") is a table over a slot's genes of kernel and mid channels, (0, 2) a table over
    its genes of operand kinds 0 and 2. "resolution" may be in any group. Cell `size`, after the last table, is for
    idle slots.
    """

    def __init__(self, space: SearchSpace, axes: Sequence[Sequence[str | int]]) -> None:
        self.space, self.axes = space, [tuple(group) for group in axes]
        counts, slots = cardinalities(space), range(len(space.slots))
        self.shapes = [
            tuple(int(counts[gene_column(space, what, slot)]) for what in group)
            for group in self.axes
            for slot in slots
        ]
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        self.size = int(ends[-1])
        self._starts = np.concatenate([[0], ends[:-1]]).reshape(len(self.axes), len(slots))
        self._strides = [  # group -> axis -> (slots,)
            [np.array([math.prod(shape[axis + 1 :]) for shape in shapes]) for axis in range(len(group))]
            for group, shapes in zip(self.axes, zip(*[iter(self.shapes)] * len(slots), strict=True), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[int, int, tuple[int, ...], slice]]:
        """Yield (group, slot, shape of the table, slice of the flat array) for every table, group by group."""
        for table, (start, shape) in enumerate(zip(self._starts.flat, self.shapes, strict=True)):
            group, slot = divmod(table, len(self.space.slots))
            yield group, slot, shape, slice(int(start), int(start) + math.prod(shape))

    def index(self, genes: np.ndarray) -> np.ndarray:
        """(groups, n, slots) int64 cells of a gene matrix."""
        # Integer arithmetic, because a matrix product would start BLAS threads that compete with torch's.
        idle = ~active(self.space, genes)
        cells = np.empty((len(self.axes), *idle.shape), dtype=np.int64)
        for group, strides, starts, out in zip(self.axes, self._strides, self._starts, cells, strict=True):
            out[:] = starts
            for what, stride in zip(group, strides, strict=True):
                first = gene_column(self.space, what)
                out += genes[:, first : first + (1 if what == "resolution" else len(stride))] * stride
            np.copyto(out, self.size, where=idle)
        return cells
