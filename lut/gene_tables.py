"""Per-slot tables over genes in one flat array: they turn costs and the predictor's first layer into gathers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from apq.genes import active, cardinalities, chosen, slot_genes
from apq.space import SearchSpace


def gene_column(space: SearchSpace, what: str | int, slot: int = 0) -> int:
    """Column of the "resolution", or of a slot's kernel ("ks"), mid channels ("e") or bits (index of the kind)."""
    if what == "resolution":
        return len(cardinalities(space)) - 1
    return _part(what) * len(space.slots) + slot


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
        self._type = np.int32 if self.size < 2**31 else np.int64
        self._starts = np.concatenate([[0], ends[:-1]]).reshape(len(self.axes), len(slots)).astype(self._type)
        self._strides = np.zeros((len(self.axes), 2 + len(space.operands), len(slots)), self._type)
        self._resolution_strides = np.zeros(self._starts.shape, self._type)
        for (group, strides), slot in itertools.product(enumerate(self._strides), slots):
            shape = self.shapes[group * len(slots) + slot]
            for axis, what in enumerate(self.axes[group]):
                of_axis = self._resolution_strides[group] if what == "resolution" else strides[_part(what)]
                of_axis[slot] = math.prod(shape[axis + 1 :])

    def __iter__(self) -> Iterator[tuple[int, int, tuple[int, ...], slice]]:
        """Yield (group, slot, shape of the table, slice of the flat array) for every table, group by group."""
        for table, (start, shape) in enumerate(zip(self._starts.flat, self.shapes, strict=True)):
            group, slot = divmod(table, len(self.space.slots))
            yield group, slot, shape, slice(int(start), int(start) + math.prod(shape))

    def index(self, genes: np.ndarray) -> np.ndarray:
        """(groups, n, slots) int32 or int64 cells of a gene matrix."""
        parts = slot_genes(self.space, genes).astype(self._type)
        # Integers in einsum, because a matrix product would start BLAS threads that compete with torch's.
        cells = np.empty((len(self.axes), len(genes), len(self.space.slots)), self._type)
        for strides, out in zip(self._strides, cells, strict=True):
            np.einsum("nps,ps->ns", parts, strides, out=out)
        cells += self._starts[:, None]
        if len(self.space.resolutions) > 1:
            cells += genes[:, -1:] * self._resolution_strides[:, None]
        return chosen(active(self.space, genes), cells, np.asarray(self.size, self._type))


def _part(what: str | int) -> int:
    """Place of a slot's gene among the parts of `slot_genes`."""
    return {"ks": 0, "e": 1}[what] if isinstance(what, str) else 2 + what
