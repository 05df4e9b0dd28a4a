"""Cost tables in the published JSON form: written for a space, or measured on a device of your own."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from apq.bounds import is_number
from apq.errors import UserError
from apq.files import Record, read_json
from apq.layers import FIXED_BITS, ConvLayer, first_layers, last_layers, searchable_layers
from apq.space import SearchSpace
from lut.accelerator import Accelerator
from lut.cost_model import COLUMN, CostModel, digest_of

PUBLISHED_KEY = re.compile(r"head|tail|\(\d+(, \d+){6}\)-W\d+A\d+")
MEASURED = "measured"  # the key of what is no row: facts of a measurement
MOST_FACT = 200  # characters of a fact
PARTS = {"first_conv": "head", "feature_mix_layer": "tail"}  # keys of layers that the published table has by name


@dataclass(frozen=True)
class PublishedTable(CostModel):
    """A cost table in the published form: `rows` map a key to (ms, mJ), where mJ may be NaN: not known.

    The first convolution and the last 1x1 cost `head` and `tail` where they have no row of their own. `measured` are
    facts of the measurement that made the table, such as its "runtime" and "machine".
    """

    path: Path
    rows: dict[str, tuple[float, float]]
    measured: Record = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.measured:
            return f"table {self.path}"
        known = {name: self.measured.get(name, "unknown") for name in ("runtime", "version", "bits", "threads")}
        return "table {} ({runtime} {version} at {bits} bits with {threads} thread(s))".format(self.path, **known)

    def record(self) -> Record:
        """See `CostModel.record`."""
        return {"accelerator": asdict(Accelerator()), "table": str(self.path)}

    def digest(self) -> str:
        """A hash of the rows, because the file may change."""
        return digest_of(self.rows)

    def covers(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers,) bool: which layers have a row."""
        return np.array([self._row(layer) is not None for layer in layers], dtype=bool)

    def price(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers, 2) float64 milliseconds and millijoules. UserError names the first layer without a row."""
        return np.array([self._cost(layer) for layer in layers], dtype=np.float64).reshape(len(layers), 2)

    def _row(self, layer: ConvLayer) -> tuple[float, float] | None:
        return self.rows.get(layer_key(layer)) or self.rows.get(_part_of(layer))

    def _cost(self, layer: ConvLayer) -> tuple[float, float]:
        row = self._row(layer)
        if row is None:
            raise UserError(
                f"{self.path} ({len(self.rows)} rows) has no row {layer_key(layer)} for layer "
                f"{layer.name or 'without a name'}; add it, or write a table for your space with python -m lut"
            )
        return row


def load(path: Path) -> PublishedTable:
    """Read a table in the published form. UserError for any other file, and for a key with two costs.

    Rows may lack their energy. An object under the key "measured" has facts of the measurement, see `PublishedTable`.
    """
    data, path = read_json(Path(path)), Path(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not an object of cost rows")
    rows, measured = {}, _facts(path, data.pop(MEASURED, {}))
    for key, row in data.items():
        if not PUBLISHED_KEY.fullmatch(key):
            raise UserError(
                f"{path}: key {key!r} is not head, tail or like '(96, 456, 14, 1, 1, 0, 1)-W4A4': "
                "(in, out, input side, kernel, stride, padding, groups)-WwAa"
            )
        if not isinstance(row, dict) or not all(_is_cost(row.get(name, 0)) for name in COLUMN) or "latency" not in row:
            raise UserError(
                f"{path}: row {key} must hold latency in ms and energy in mJ (which may be left out), numbers not "
                "below 0"
            )
        rows[key] = (row["latency"], row.get("energy", math.nan))
    return PublishedTable(path, rows, measured)


def build(space: SearchSpace, cost_model: CostModel) -> dict[str, dict[str, float]]:
    """The cost table of a space in the published form: every searchable layer, `head` and `tail` (W8A8).

    Values are {"latency": ms, "energy": mJ}. `head` and `tail` are those of the
    largest resolution. Where the budgets of the space count every layer (scope `full`), the first block and the
    classifier have rows too.
    """
    layers = layers_of_table(space)
    costs = cost_model.price(list(layers.values()))
    if np.isnan(costs).any():
        raise UserError(f"no cost table is written of {cost_model}, whose latency and energy are not both known")
    return {key: {"latency": ms, "energy": mj} for key, (ms, mj) in zip(layers, costs.tolist(), strict=True)}


def layers_of_table(space: SearchSpace) -> dict[str, ConvLayer]:
    """By key: the layers of the rows that `build` writes."""
    layers = searchable_layers(space)
    if space.budget_scope == "full":
        for resolution in space.resolutions:
            layers += [*first_layers(space, resolution)[1:], *last_layers(space, resolution)[1:]]
    ends = [part(space, space.resolutions[-1], "published")[0] for part in (first_layers, last_layers)]
    return {layer_key(layer): layer for layer in layers} | dict(zip(("head", "tail"), ends, strict=True))


def layer_key(layer: ConvLayer) -> str:
    """The published key of a layer: (in, out, input side, kernel, stride, padding, groups)-WwAa.

    >>> layer_key(ConvLayer(96, 456, 14, 1, 1, 1, 4, 4))
    '(96, 456, 14, 1, 1, 0, 1)-W4A4'
    """
    shape = (layer.in_channels, layer.out_channels, layer.input_size, layer.kernel_size, layer.stride)
    return f"{(*shape, layer.kernel_size // 2, layer.groups)}-W{layer.w_bits}A{layer.a_bits}"


def _part_of(layer: ConvLayer) -> str:
    """The key of a layer that has a row by name, "" for others.

    In a built network the layer is the convolution inside a unit of that name. There its bits may be searched, and the
    row is for 8 bits alone.
    """
    unit, inside, _ = layer.name.partition(".conv")
    at_8_bits = layer.w_bits == layer.a_bits == FIXED_BITS
    return PARTS.get(unit, "") if not inside or at_8_bits else ""


def _facts(path: Path, facts: object) -> Record:
    """Facts of a measurement. UserError unless they are short texts and numbers."""
    if not isinstance(facts, dict) or not all(_is_fact(value) for value in facts.values()):
        raise UserError(f'{path}: "{MEASURED}" must be an object of short texts and numbers')
    return facts


def _is_fact(value: object) -> bool:
    return is_number(value) or (isinstance(value, str) and value.isprintable() and len(value) <= MOST_FACT)


def _is_cost(value: object) -> bool:
    return is_number(value, 0)
