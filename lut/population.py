"""The cost of a population: tables of block costs over genes, so that pricing is a gather."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from apq.genes import CHUNK, cardinalities, subnets_of, view
from apq.layers import (
    ConvLayer,
    first_layers,
    last_layers,
    shared_choices,
    shared_layer,
    squeeze_layers,
)
from apq.operands import BLOCK_LAYERS
from apq.space import SearchSpace
from apq.subnet import Subnet
from lut.cost_model import CostModel
from lut.costs import UNITS, check_quantity, layer_quantity
from lut.gene_tables import GeneTables, gene_column
from lut.layer_grids import grid_costs, grid_of

GROUPS = (("expand", "project"), ("depthwise",))  # the layers of a block that share a table


class PopulationCost:
    """Cost of many subnets of a space.

    Construction prices every layer that a slot can run. The two pointwise layers of a block share one table; the
    depthwise layer and squeeze-and-excitation have another. Cells that a rule of the space forbids are infinite.

    Args:
        quantity: one of `UNITS`; `unit` is that of the costs.
        cost_model: prices latency and energy, which need one; the other quantities are counted.
        scope: `published` leaves out the first inverted-residual block and the classifier, as APQ's totals do.
    """

    def __init__(
        self, space: SearchSpace, quantity: str, cost_model: CostModel | None = None, scope: str = "full"
    ) -> None:
        check_quantity(quantity, cost_model)
        self.space, self.quantity, self.unit, self.scope = space, quantity, UNITS[quantity], scope
        self._axes = [_axes_of(space, roles) for roles in GROUPS]
        self._tables = GeneTables(space, [("resolution", *axes) for axes in self._axes])

        ids: dict[ConvLayer, int] = {}  # every distinct layer once: many slots have the same
        ends = [[*first_layers(space, r, scope), *last_layers(space, r, scope)] for r in space.resolutions]
        choosing = [layer.name for layer in ends[0] if layer.name in {f.layer for f in space.shared_operands}]
        fixed = [[ids.setdefault(layer, len(ids)) for layer in row if layer.name not in choosing] for row in ends]
        chosen = {name: _chosen_ids(space, name, ids) for name in choosing}
        squeezes = [
            [
                [ids.setdefault(layer, len(ids)) for layer in squeeze_layers(space, slot, mid)]
                for mid in slot.mid_channels
            ]
            for slot in space.slots
        ]
        costs = layer_quantity(list(ids), quantity, cost_model)
        costs_at = self._slot_costs(cost_model)
        self._fixed = np.array([costs[row].sum() for row in fixed])  # (resolutions,)
        self._chosen = [(_columns_of(space, name), costs[ids_of]) for name, ids_of in chosen.items()]
        self._cells = np.zeros(self._tables.size + 1)  # the last cell is for idle slots
        for group, slot, shape, place in self._tables:
            cells = self._cells[place].reshape(shape)  # (resolutions, choices of the group's axes ...)
            for r, role in itertools.product(range(len(space.resolutions)), GROUPS[group]):
                cells[r] += _spread(costs_at[role, r, slot], _axes_of(space, (role,)), self._axes[group])
            if "depthwise" in GROUPS[group]:
                cells += _spread(np.array([costs[row].sum() for row in squeezes[slot]]), ("e",), self._axes[group])

    def _slot_costs(self, cost_model: CostModel | None) -> dict[tuple[str, int, int], np.ndarray]:
        """(role, resolution, slot) -> costs over `_axes_of(space, (role,))`. Equal grids of layers are priced once."""
        space, grids, keys = self.space, {}, {}
        for r, resolution in enumerate(space.resolutions):
            sides = space.input_sides(resolution)
            for slot, role in itertools.product(space.slots, BLOCK_LAYERS):
                key = (role, sides[slot.index], slot.in_channels, slot.out_channels, slot.stride, slot.mid_channels)
                keys[role, r, slot.index] = key
                if key not in grids:
                    grids[key] = grid_of(space, slot, role, sides[slot.index], _axes_of(space, (role,)))
        costs = dict(zip(grids, grid_costs(list(grids.values()), self.quantity, cost_model), strict=True))
        return {place: costs[key] for place, key in keys.items()}

    def predict(self, genes: np.ndarray) -> np.ndarray:
        """(n,) float64 costs of a gene matrix, in `unit`."""
        costs = np.empty(len(genes))
        for start in range(0, len(genes), CHUNK):
            costs[start : start + CHUNK] = self._predict(genes[start : start + CHUNK])
        return costs

    def _predict(self, genes: np.ndarray) -> np.ndarray:
        parts = view(self.space, genes)
        fixed = self._fixed[parts.resolution]
        for columns, costs in self._chosen:
            fixed = fixed + costs[(parts.resolution, *(0 if c is None else parts.shared_bits[:, c] for c in columns))]
        # One axis after the other: over both at once the order of the sum, and so its last digit, depends on n.
        return self._cells.take(self._tables.index(genes)).sum(axis=2).sum(axis=0) + fixed

    def cheapest(self) -> tuple[float, Subnet]:
        """Lowest cost of all legal subnets, and a subnet with that cost. Exact, without a search."""
        genes = self.cheapest_genes()[None]
        return float(self.predict(genes)[0]), subnets_of(self.space, genes)[0]

    def cheapest_genes(self) -> np.ndarray:
        """(genes,) row of the cheapest subnet. It is not canonical: idle slots hold their cheapest block.

        Blocks are independent once depths and resolution are given, so each takes its own minimum.
        """
        space, best = self.space, (np.inf, np.zeros(0, dtype=np.int64))
        for r in range(len(space.resolutions)):
            row = np.zeros((1, len(cardinalities(space))), dtype=np.int64)
            view(space, row).resolution[:] = r
            costs = np.array([self._set_cheapest_block(row[0], r, slot.index) for slot in space.slots])  # (slots,)
            total = self._fixed[r]
            for columns, of_layer in self._chosen:
                total += of_layer[r].min()
                for column, gene in zip(
                    columns, np.unravel_index(of_layer[r].argmin(), of_layer[r].shape), strict=True
                ):
                    if column is not None:
                        view(space, row).shared_bits[0, column] = gene
            for i, stage in enumerate(space.stages):
                by_depth = costs[space.stage_of_slot == i].cumsum()[np.array(stage.depths) - 1]  # (depths,)
                view(space, row).d[0, i] = by_depth.argmin()
                total += by_depth.min()
            best = min(best, (total, row[0]), key=lambda found: found[0])
        return best[1]

    def _set_cheapest_block(self, row: np.ndarray, r: int, slot: int) -> float:
        space, axes = self.space, ("ks", "e", *range(len(self.space.operands)))
        block = np.zeros([cardinalities(space)[gene_column(space, axis, slot)] for axis in axes])
        for group, of_slot, shape, place in self._tables:
            if of_slot == slot:
                block += _spread(self._cells[place].reshape(shape)[r], self._axes[group], axes)
        for rule in space.forbidden:  # a rule may concern a kernel and pointwise bits, which share no table
            kind = [k.name for k in space.operands].index(rule.operand)
            choices = space.operands[kind].choices
            if rule.kernel_size in space.kernel_sizes and rule.bits in choices:
                kernel = block[space.kernel_sizes.index(rule.kernel_size)]  # (widths, bits of every kind ...)
                np.moveaxis(kernel, 1 + kind, 0)[choices.index(rule.bits)] = np.inf
        choice = np.unravel_index(block.argmin(), block.shape)
        for axis, gene in zip(axes, choice, strict=True):
            row[gene_column(space, axis, slot)] = gene
        return float(block[choice])


def _columns_of(space: SearchSpace, name: str) -> tuple[int | None, int | None]:
    """Columns of a shared layer's weight and activation bits in `shared_bits`; None where they are not searched."""
    columns = {f.operand: i for i, f in enumerate(space.shared_operands) if f.layer == name}
    return columns.get("w"), columns.get("a")


def _chosen_ids(space: SearchSpace, name: str, ids: dict[ConvLayer, int]) -> np.ndarray:
    """(resolutions, weight choices, activation choices) numbers in `ids` of a shared layer."""
    w_bits, a_bits = shared_choices(space, name)
    points = itertools.product(space.resolutions, w_bits, a_bits)
    numbers = [ids.setdefault(shared_layer(space, name, *point), len(ids)) for point in points]
    return np.array(numbers).reshape(len(space.resolutions), len(w_bits), len(a_bits))


def _axes_of(space: SearchSpace, roles: tuple[str, ...]) -> tuple[str | int, ...]:
    kinds = sorted({space.kind_of(role, operand) for role in roles for operand in "wa"})
    return (*(("ks",) if "depthwise" in roles else ()), "e", *kinds)


def _spread(values: np.ndarray, axes: Sequence[str | int], onto: Sequence[str | int]) -> np.ndarray:
    """Give `values` over `axes` the axes of `onto`, in the same order, with length 1 for those that they lack."""
    return values.reshape([values.shape[axes.index(axis)] if axis in axes else 1 for axis in onto])
