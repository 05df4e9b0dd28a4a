"""Measured costs of one network in HAQ's form: a CSV file of layer number, weight bits, activation bits, cost."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from apq.bounds import read_bytes
from apq.errors import UserError
from apq.files import Record
from apq.layers import ConvLayer
from lut.accelerator import Accelerator
from lut.cost_model import COLUMN, UNITS, CostModel, digest_of

MOST_BITS = 8
COST = {"cost", "price"}  # what a column of costs may be called, whatever the quantity
OWN_UNITS = {  # in what units a device may be measured, beside those of UNITS, as a header has them
    "latency": "s sec seconds ns us \u03bcs cycles",
    "energy": "j nj \u03bcj uj pj",
    "bitops": "k m g t",
    "size": "b kb mb gb kib mib gib bit bits",
    "flops": "k m g t",
}
WHOLE = re.compile(r"-?[0-9]{1,9}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, eq=False)
class MeasuredTable(CostModel):
    """Measured costs of the layers of one network at 1 to 8 bits, in the unit of the file.

    `cells[layer, w - 1, a - 1]` is the cost of layer `names[layer]` at w weight bits and a activation bits, NaN where
    it was not measured. It is the cost of all runs of the layer, see `of_all_runs`.

    `costs_of(quantity, layers)` has these costs, whatever the quantity is. `price` has them in its column of
    `quantity`. Its other column is NaN, and so are both if `quantity` is neither latency nor energy.
    """

    of_all_runs = True

    path: Path
    names: tuple[str, ...]
    quantity: str
    cells: np.ndarray  # (layers, 8, 8) float64

    def __str__(self) -> str:
        return f"table {self.path}"

    def record(self) -> Record:
        """Plain data for config.json.

        `cost_model_from_record` reads it back as the published BitFusion, which prices networks in reports. Reports
        show the measured cost beside it: they load this table again from the path under "measured".
        """
        return {"accelerator": asdict(Accelerator()), "table": None, "measured": str(self.path)}

    def digest(self) -> str:
        """A hash of the costs, because the file may change."""
        return digest_of([self.names, self.quantity, self.cells.tolist()])

    def covers(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers,) bool: which layers were measured at their bits."""
        return ~np.isnan(self._measured(layers))

    def price(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers, 2) float64, with costs in the column of `quantity`. UserError names the first layer without one."""
        costs = self._measured(layers)
        if np.isnan(costs).any():
            layer = layers[int(np.isnan(costs).argmax())]
            raise UserError(
                f"{self.path} has no cost of layer {layer.name or 'without a name'} at {layer.w_bits} weight and "
                f"{layer.a_bits} activation bits"
            )
        columns = np.full((len(layers), 2), np.nan)
        if self.quantity in COLUMN:
            columns[:, COLUMN[self.quantity]] = costs
        return columns

    def costs_of(self, quantity: str, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers,) float64 measured costs if `quantity` is that of the table. See `CostModel.costs_of` for others."""
        return self._measured(layers) if quantity == self.quantity else super().costs_of(quantity, layers)

    def counts(self, quantity: str) -> bool:
        """See `CostModel.counts`."""
        return quantity != self.quantity and super().counts(quantity)

    def unit_of(self, quantity: str) -> str:
        """See `CostModel.unit_of`."""
        return "in the unit of its table" if quantity == self.quantity else super().unit_of(quantity)

    def _measured(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers,) float64 costs, NaN where there is none."""
        places, costs = {name: place for place, name in enumerate(self.names)}, np.full(len(layers), np.nan)
        for i, layer in enumerate(layers):
            if layer.name in places and 1 <= layer.w_bits <= MOST_BITS and 1 <= layer.a_bits <= MOST_BITS:
                costs[i] = self.cells[places[layer.name], layer.w_bits - 1, layer.a_bits - 1]
        return costs


def load_measured(path: Path, names: Sequence[str], quantity: str) -> MeasuredTable:
    """Read the costs of `quantity` from a CSV file, for a network whose layers have these names, in running order.

    Columns are separated by commas, semicolons or tabs. The first line may name them, in any order; without it they are
    layer, w_bits, a_bits, cost. Empty lines and empty cells at the ends of lines are skipped. The column of costs is
    called cost, price or by the quantity, which a unit of the quantity may follow. UserError for any other file, for
    one without rows, and for rows that contradict each other.
    """
    cells = np.full((len(names), MOST_BITS, MOST_BITS), np.nan)
    try:
        rows = _rows(read_bytes(path).decode("utf-8-sig"))
        places = _places(rows.pop(0)[1], quantity) if rows and not any(map(_is_number, rows[0][1])) else range(4)
        if not rows:
            raise ValueError("it has no rows")
        for line, row in rows:
            _put(cells, line, row, places)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is not a table of layer,w_bits,a_bits,cost for {len(names)} layers: {error}"
        ) from error
    return MeasuredTable(path, tuple(names), quantity, cells)


def _rows(text: str) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file that are not empty, each with its number of line."""
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    reader = csv.reader(lines, delimiter=max(",;\t", key=first.count))
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    return [(line, _without_empty_end(row)) for line, row in rows if any(row)]


def _without_empty_end(row: list[str]) -> list[str]:
    """A row without its last cells as far as they are empty, as spreadsheets write them."""
    return row[: max(i for i, cell in enumerate(row) if cell) + 1]


def _places(header: list[str], quantity: str) -> list[int]:
    """The columns of layer, weight bits, activation bits and cost, by a header. ValueError for one that is unclear."""
    names = [name.casefold() for name in header]
    names = [name.removesuffix("_bits") if name in ("w_bits", "a_bits") else name for name in names]
    cost = [name for name in names if name not in ("layer", "w", "a")]
    if len(names) != 4 or len({*names}) != 4 or len(cost) != 1:
        raise ValueError(f"its columns are {', '.join(header)}; they must be layer, w_bits, a_bits and a cost")
    _check_costs(cost[0], quantity)
    return [names.index(name) for name in ("layer", "w", "a", *cost)]


def _check_costs(name: str, quantity: str) -> None:
    """ValueError unless this is a name for costs of a quantity: cost, price or the quantity, alone or with a unit."""
    first, *unit = [word for word in re.split(r"[\W_]+", name) if word] or [""]
    units = {UNITS[quantity].casefold(), *OWN_UNITS[quantity].split()}
    if first in UNITS and first != quantity:
        raise ValueError(f"its costs are {name[:40]}, not {quantity}")
    if first not in {*COST, quantity} or len(unit) > 1 or not units.issuperset(unit):
        raise ValueError(
            f"its costs are called {name[:40]}; they must be cost, price or {quantity}, alone or with a unit of it"
        )


def _put(cells: np.ndarray, line: int, row: list[str], places: Sequence[int]) -> None:
    """Put the cost of a row into its cell. ValueError for a bad row, and where the cell has another cost."""
    if len(row) != len(places):
        raise ValueError(f"line {line} has {len(row)} columns, not {len(places)}")
    layer, w, a, cost = (row[place] for place in places)
    try:
        cell, value = (_index(layer, len(cells)), _index(w, MOST_BITS, 1), _index(a, MOST_BITS, 1)), _cost(cost)
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from error
    if not np.isnan(cells[cell]) and cells[cell] != value:
        raise ValueError(
            f"line {line}: layer {layer} at {w} weight and {a} activation bits costs {cost}, but {cells[cell]:g} before"
        )
    cells[cell] = value


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None


def _cost(text: str) -> float:
    value = float(text) if _is_number(text) else math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"cost {text[:40]} is not a number from 0 up, with a decimal point")
    return value


def _index(text: str, n: int, first: int = 0) -> int:
    if not WHOLE.fullmatch(text):
        raise ValueError(f"{text[:40]} is not a whole number, in digits 0 to 9 alone")
    value = int(text) - first
    if not 0 <= value < n:
        raise ValueError(f"{text} is not from {first} to {n - 1 + first}")
    return value
