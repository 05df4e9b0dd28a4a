"""All layers that a slot can run in one role, as one layer of arrays, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apq.layers import ConvLayer, slot_layer
from apq.space import SearchSpace, Slot
from lut.cost_model import COUNTED, CostModel
from lut.costs import layer_quantity
from lut.layer_rows import values_of


@dataclass(frozen=True, eq=False)
class LayerGrid:
    """The layers of a slot in one role for every choice of some axes."""

    layer: ConvLayer  # its sizes and bits are float64 arrays that broadcast to the shape of `legal`
    legal: np.ndarray  # (choices of each axis ...) bool: which no rule of the space forbids

    def rows(self) -> np.ndarray:
        """(n, 9) int64 columns `layer_rows.COLUMNS` of all of them, in the order of a flat array."""
        columns = [np.broadcast_to(value, self.legal.shape).ravel() for value in values_of(self.layer)]
        return np.stack(columns, axis=1).astype(np.int64)


def grid_of(space: SearchSpace, slot: Slot, role: str, side: int, axes: Sequence[str | int]) -> LayerGrid:
    """The layers of a slot whose input has this side: one for each choice of "ks", "e" and kinds of bits in `axes`."""
    values = {"ks": space.kernel_sizes, "e": slot.mid_channels}
    choices = [values[axis] if isinstance(axis, str) else space.operands[axis].choices for axis in axes]
    points = np.meshgrid(*(np.array(c, dtype=np.float64) for c in choices), indexing="ij", sparse=True)
    at = dict(zip(axes, points, strict=True))
    w_kind, a_kind = space.kind_of(role, "w"), space.kind_of(role, "a")
    legal = np.ones([len(c) for c in choices], dtype=bool)
    if role == "depthwise":
        for rule in space.forbidden:
            for kind in {w_kind, a_kind}:
                if space.operands[kind].name == rule.operand:
                    legal &= (at["ks"] != rule.kernel_size) | (at[kind] != rule.bits)
    return LayerGrid(slot_layer(space, slot, role, side, at["e"], at.get("ks", 1), at[w_kind], at[a_kind]), legal)


def grid_costs(grids: Sequence[LayerGrid], quantity: str, cost_model: CostModel | None) -> list[np.ndarray]:
    """The float64 costs of each grid, infinite where a rule forbids the layer. See `layer_quantity` for errors."""
    if cost_model is None or cost_model.counts(quantity):
        costs = [np.broadcast_to(getattr(grid.layer, COUNTED[quantity]), grid.legal.shape) for grid in grids]
    else:
        rows = np.concatenate([grid.rows() for grid in grids])
        legal = np.concatenate([grid.legal.ravel() for grid in grids])
        flat = np.full(len(rows), np.inf)
        flat[legal] = _row_costs(grids, rows[legal], quantity, cost_model)
        ends = np.cumsum([grid.legal.size for grid in grids])
        costs = [part.reshape(grid.legal.shape) for part, grid in zip(np.split(flat, ends[:-1]), grids, strict=True)]
    return [np.where(grid.legal, cost, np.inf) for grid, cost in zip(grids, costs, strict=True)]


def _row_costs(grids: Sequence[LayerGrid], rows: np.ndarray, quantity: str, cost_model: CostModel) -> np.ndarray:
    """(n,) costs of all legal layers of the grids, whose numbers are `rows`."""
    costs = cost_model.costs_of_rows(quantity, rows)
    if costs is not None and np.isfinite(costs).all():
        return costs
    # One by one: each distinct layer once, with its name, which errors tell.
    names = np.repeat([grid.layer.name for grid in grids], [int(grid.legal.sum()) for grid in grids]).tolist()
    layers = [ConvLayer(*row, name=name) for row, name in zip(rows.tolist(), names, strict=True)]
    places = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
    return layer_quantity(list(places), quantity, cost_model)[[places[layer] for layer in layers]]
