"""Cost tables: priced layers cached on disk, the published JSON form, and tables measured on one's own device."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from apq.errors import UserError
from apq.files import atomic_open, cache_folder, read_arrays, read_json
from apq.layers import ConvLayer, first_layers, last_layers, searchable_layers
from apq.space import SearchSpace
from lut.accelerator import Accelerator
from lut.bitfusion import BitFusion, Costs

MODEL_VERSION = 1  # raise it when the cost model changes: it parts the caches
PUBLISHED_KEY = re.compile(r"head|tail|\(\d+(, \d+){6}\)-W\d+A\d+")


def price(layers: Sequence[ConvLayer], accelerator: Accelerator | None = None) -> Costs:
    """`BitFusion(accelerator).cost(layers)` with a cache on disk: only layers that it lacks are computed."""
    accelerator = accelerator or Accelerator()
    file = cache_file(accelerator)
    known = _read_cache(file)
    missing = [layer for layer in dict.fromkeys(layers) if _row(layer) not in known]
    if missing:
        costs = BitFusion(accelerator).cost(missing)
        known |= {_row(layer): pair for layer, pair in zip(missing, zip(*costs, strict=True), strict=True)}
        # A cache that cannot be kept is no loss.
        with contextlib.suppress(OSError, UserError), atomic_open(file, "wb") as out:
            np.savez(out, layers=np.array(list(known)), costs=np.array(list(known.values())))
    found = np.array([known[_row(layer)] for layer in layers], dtype=np.float64).reshape(len(layers), 2)
    return Costs(latency_ms=found[:, 0], energy_mj=found[:, 1])


def cache_file(accelerator: Accelerator) -> Path:
    """Where an accelerator's prices are kept: in the cache folder, one file a configuration."""
    key = json.dumps({"version": MODEL_VERSION, **asdict(accelerator)}, sort_keys=True)
    return cache_folder() / f"bitfusion-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _row(layer: ConvLayer) -> tuple[int, ...]:
    shape = (layer.in_channels, layer.out_channels, layer.input_size, layer.kernel_size, layer.stride, layer.groups)
    return (*shape, layer.w_bits, layer.a_bits, int(layer.image_input))


def _read_cache(file: Path) -> dict[tuple[int, ...], tuple[float, float]]:
    try:
        arrays = read_arrays(file)
        rows, costs = arrays["layers"], arrays["costs"]
        if rows.ndim != 2 or rows.dtype.kind != "i" or costs.shape != (len(rows), 2) or not np.isfinite(costs).all():
            return {}
        return {tuple(row): tuple(pair) for row, pair in zip(rows.tolist(), costs.tolist(), strict=True)}
    except (UserError, KeyError, TypeError):
        return {}  # absent or damaged: it is made anew


def build(space: SearchSpace, accelerator: Accelerator | None = None) -> dict[str, dict[str, float]]:
    """The whole table of a space in the published form: every searchable layer, `head` and `tail` (W8A8).

    Values are {"latency": ms, "energy": mJ}. A space of several resolutions has head and tail of the largest. Where the
    space's budgets count every layer (scope `full`), the fixed first block and the classifier have rows too.
    """
    layers = searchable_layers(space)
    if space.budget_scope == "full":
        for resolution in space.resolutions:
            layers += [*first_layers(space, resolution)[1:], *last_layers(space, resolution)[1:]]
    ends = [part(space, space.resolutions[-1], "published")[0] for part in (first_layers, last_layers)]
    costs = price([*layers, *ends], accelerator)
    keys = [*(layer_key(layer) for layer in layers), "head", "tail"]
    return {
        key: {"latency": float(ms), "energy": float(mj)}
        for key, ms, mj in zip(keys, costs.latency_ms, costs.energy_mj, strict=True)
    }


def layer_key(layer: ConvLayer) -> str:
    """The published key: (in, out, input side, kernel, stride, padding, groups)-WwAa.

    >>> layer_key(ConvLayer(96, 456, 14, 1, 1, 1, 4, 4))
    '(96, 456, 14, 1, 1, 0, 1)-W4A4'
    """
    shape = (layer.in_channels, layer.out_channels, layer.input_size, layer.kernel_size, layer.stride)
    return f"{(*shape, layer.kernel_size // 2, layer.groups)}-W{layer.w_bits}A{layer.a_bits}"


@dataclass(frozen=True)
class PublishedTable:
    """A table in the published form, say one measured on another device: `rows` map a key to (ms, mJ)."""

    path: Path
    rows: dict[str, tuple[float, float]]

    def lookup(self, layers: Sequence[ConvLayer]) -> Costs:
        """Costs of layers; UserError names the first without a row.

        The first convolution and the last 1x1 of a network cost `head` and `tail` where they have no row of their own.
        """
        found = np.array([self._cost(layer) for layer in layers], dtype=np.float64).reshape(len(layers), 2)
        return Costs(latency_ms=found[:, 0], energy_mj=found[:, 1])

    def covers(self, layers: Sequence[ConvLayer]) -> bool:
        """Whether every layer has a row."""
        return all(self._row(layer) is not None for layer in layers)

    def _row(self, layer: ConvLayer) -> tuple[float, float] | None:
        part = {"first_conv": "head", "feature_mix_layer": "tail"}.get(layer.name, "")
        return self.rows.get(layer_key(layer)) or self.rows.get(part)

    def _cost(self, layer: ConvLayer) -> tuple[float, float]:
        row = self._row(layer)
        if row is None:
            raise UserError(
                f"{self.path} ({len(self.rows)} rows) has no row {layer_key(layer)} for layer "
                f"{layer.name or 'without a name'}; add it, or write a table for your space with python -m lut"
            )
        return row


def load(path: Path) -> PublishedTable:
    """Read a table in the published form; UserError where it is not one."""
    data, path = read_json(Path(path)), Path(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not an object of cost rows")
    rows = {}
    for key, row in data.items():
        if not PUBLISHED_KEY.fullmatch(key):
            raise UserError(
                f"{path}: key {key!r} is not head, tail or like '(96, 456, 14, 1, 1, 0, 1)-W4A4': "
                "(in, out, input side, kernel, stride, padding, groups)-WwAa"
            )
        cost = (row.get("latency"), row.get("energy")) if isinstance(row, dict) else ()
        if not cost or not all(_is_cost(value) for value in cost):
            raise UserError(f"{path}: row {key} must hold latency in ms and energy in mJ, numbers not below 0")
        rows[key] = cost
    return PublishedTable(path, rows)


def _is_cost(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
