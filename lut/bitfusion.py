"""The BitFusion cost model: milliseconds and millijoules of convolutions on an accelerator at batch 1.

Source: Sharma et al., ISCA 2018; details fitted to the cost table that APQ (CVPR 2020) published.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apq.cache import read_cache, write_cache
from apq.files import Record, cache_folder
from apq.layers import ConvLayer
from lut.accelerator import Accelerator
from lut.cost_model import CostModel
from lut.layer_rows import BITS, COLUMNS, at_most_bits, checked_rows, complain, values_of
from lut.tilings import DenseConvs, ceil_div, fusion_factor, solve

DEPTHWISE_CHANNELS = 8  # channels of a depthwise layer that run at once at the accelerator's most bits
MODEL_VERSION = 1  # raise it when the cost model changes: caches of other versions are not read


class Costs(NamedTuple):
    """Cost of each of n layers at batch 1: two float64 arrays `(n,)`."""

    latency_ms: np.ndarray
    energy_mj: np.ndarray


@dataclass(frozen=True)
class BitFusion(CostModel):
    """BitFusion cost model of an accelerator (default: as published)."""

    config: Accelerator = field(default_factory=Accelerator)

    def __str__(self) -> str:
        published = asdict(Accelerator())
        changed = [f"{name} {value}" for name, value in asdict(self.config).items() if value != published[name]]
        return "BitFusion with " + ", ".join(changed) if changed else "BitFusion as published"

    def record(self) -> Record:
        """See `CostModel.record`."""
        return {"accelerator": asdict(self.config), "table": None}

    def price(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers, 2) float64: `cost(layers)`, with a cache on disk."""
        rows = np.array([values_of(layer) for layer in layers]).reshape(len(layers), len(COLUMNS))
        if rows.dtype.kind != "i":  # no layers, or impossible ones
            return np.stack(self.cost(layers), axis=1)
        return self._cached(rows, lambda places: self.cost([layers[i] for i in places]))

    def price_rows(self, rows: np.ndarray) -> np.ndarray:
        """See `CostModel.price_rows`; with a cache on disk."""
        rows, prices = at_most_bits(rows, self.config.max_bits), np.full((len(rows), 2), np.inf)
        runs = (rows[:, BITS] <= self.config.max_bits).all(axis=1)
        rows = rows[runs]
        prices[runs] = self._cached(rows, lambda places: self._solved(rows[places]))
        return prices

    def _cached(self, rows: np.ndarray, cost: Callable[[np.ndarray], Costs]) -> np.ndarray:
        """(n, 2) costs of layers as rows. `cost(places)` computes those that the cache on disk lacks, each once."""
        cached = _read_cache(self.cache_file)
        prices = cached.find(rows)
        missing = np.flatnonzero(np.isnan(prices[:, 0]))
        if len(missing):
            _, first = np.unique(_keys(rows[missing]), return_index=True)
            places = missing[np.sort(first)]
            new = _Prices(rows[places], np.stack(cost(places), axis=1))
            prices[missing] = new.find(rows[missing])
            fit = np.isfinite(new.costs[:, 0])
            whole = np.concatenate([cached.rows, new.rows[fit]]), np.concatenate([cached.costs, new.costs[fit]])
            write_cache(self.cache_file, dict(zip(("layers", "costs"), whole, strict=True)))
        return prices

    @property
    def cache_file(self) -> Path:
        """The file in the cache folder that keeps the costs on this accelerator."""
        key = json.dumps({"version": MODEL_VERSION, **asdict(self.config)}, sort_keys=True)
        return cache_folder() / f"bitfusion-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"

    def cost(self, layers: Sequence[ConvLayer]) -> Costs:
        """Milliseconds and millijoules of each layer at batch 1.

        A depthwise layer runs in blocks of channels, each of them one dense convolution. Other grouped layers cost
        `groups` times the dense convolution of one group. The first convolution of a network runs in im2col mode. The
        accelerator computes with integers, so full precision costs as much as its most bits.
        UserError where a layer is impossible, has more bits than the accelerator, or fits the buffers in no tiling.
        """
        costs = self._solved(checked_rows(self.config.max_bits, layers))
        complain(np.isinf(costs.latency_ms), layers, "no tiling of it fits the buffers of the accelerator")
        return costs

    def _solved(self, rows: np.ndarray) -> Costs:
        """Costs of checked layers, infinite where no tiling fits the buffers."""
        chip = self.config
        times, convs = _dense_convs(chip, rows)
        columns = np.stack(convs, axis=1)
        _, first, which = np.unique(_keys(columns), return_index=True, return_inverse=True)
        cycles, energy_nj = (times * solved[which] for solved in solve(chip, DenseConvs(*columns[first].T)))
        return Costs(cycles / (chip.clock_mhz * 1e3), energy_nj / 1e6)


@dataclass(frozen=True)
class _Prices:
    """What layers cost."""

    rows: np.ndarray  # (n, 9) int64, distinct
    costs: np.ndarray  # (n, 2) milliseconds, millijoules

    @functools.cached_property
    def _by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) sorted keys, and the place of each."""
        keys = _keys(self.rows)
        order = np.argsort(keys)
        return keys[order], order

    def find(self, rows: np.ndarray) -> np.ndarray:
        """(n, 2) costs of layers, NaN for those that are not there."""
        costs = np.full((len(rows), 2), np.nan)
        if len(self.rows):
            keys, order = self._by_key
            at = order.take(np.searchsorted(keys, _keys(rows)), mode="clip")
            same = (self.rows[at] == rows).all(axis=1)
            costs[same] = self.costs[at[same]]
        return costs


def _keys(rows: np.ndarray) -> np.ndarray:
    """(n,) int64 keys of rows of whole numbers. Different rows have different ones, but for one pair of 10^19."""
    multipliers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=rows.shape[1]) | 1
    return rows @ multipliers  # overflow is intended


EMPTY = _Prices(np.zeros((0, len(COLUMNS)), dtype=np.int64), np.zeros((0, 2)))


def _read_cache(file: Path) -> _Prices:
    """The costs in the cache; none where it is missing, damaged, or holds what no layer costs."""
    try:
        found = file.stat()
    except OSError:
        return EMPTY
    return _parsed(file, (found.st_ino, found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=2)  # a search asks hundreds of times
def _parsed(file: Path, version: tuple[int, ...]) -> _Prices:
    arrays = read_cache(file, {"layers": ((None, len(COLUMNS)), "int64"), "costs": ((None, 2), "float64")})
    if arrays is None:
        return EMPTY
    rows, costs = arrays["layers"], arrays["costs"]
    possible = len(rows) == len(costs) == len(np.unique(_keys(rows))) and np.isfinite(costs).all()
    if not possible or (costs[:, 0] <= 0).any() or (costs[:, 1] < 0).any():
        return EMPTY
    return _Prices(rows, costs)


def _dense_convs(chip: Accelerator, rows: np.ndarray) -> tuple[np.ndarray, DenseConvs]:
    """(n,) times that each layer runs its dense convolution, and these convolutions."""
    c, d, side, kernel, stride, groups, w, a, image = rows.T
    depthwise = (groups > 1) & (groups == c) & (groups == d)
    block = DEPTHWISE_CHANNELS * fusion_factor(chip, w, a)
    times = np.where(depthwise, ceil_div(c, block), groups)
    c, d = np.where(depthwise, block, c // groups), np.where(depthwise, block, d // groups)
    return times, DenseConvs(kernel, stride, c, d, ceil_div(side, stride), w, a, image)
