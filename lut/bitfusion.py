"""The BitFusion cost model: milliseconds and millijoules of convolutions on an accelerator at batch 1.

Source: Sharma et al., ISCA 2018; details fitted to the cost table that APQ (CVPR 2020) published.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apq.cache import read_cache, write_cache
from apq.files import Record, cache_folder
from apq.layers import ConvLayer
from lut.accelerator import Accelerator
from lut.cost_model import CostModel
from lut.layer_rows import COLUMNS, checked_rows, complain, values_of
from lut.tilings import DenseConvs, ceil_div, fusion_factor, solve

DEPTHWISE_CHANNELS = 8  # channels of a depthwise layer that run at once at the accelerator's most bits
MODEL_VERSION = 1  # raise it when the cost model changes: caches of other versions are not read

Priced = Mapping[tuple[int, ...], tuple[float, float]]  # values of a layer -> milliseconds, millijoules


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
        cached = _read_cache(self.cache_file)
        missing = [layer for layer in dict.fromkeys(layers) if values_of(layer) not in cached]
        if missing:
            costs = np.stack(self.cost(missing), axis=1).tolist()
            cached = cached | {values_of(layer): tuple(pair) for layer, pair in zip(missing, costs, strict=True)}
            rows, prices = np.array(list(cached), dtype=np.int64), np.array(list(cached.values()), dtype=np.float64)
            write_cache(self.cache_file, {"layers": rows, "costs": prices})
        return np.array([cached[values_of(layer)] for layer in layers], dtype=np.float64).reshape(len(layers), 2)

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
        chip, rows = self.config, checked_rows(self.config.max_bits, layers)
        times, convs = _dense_convs(chip, rows)
        distinct, which = np.unique(np.stack(convs, axis=1), axis=0, return_inverse=True)
        which = which.reshape(-1)  # some releases of numpy give it a second axis
        cycles, energy_nj = (times * solved[which] for solved in solve(chip, DenseConvs(*distinct.T)))
        complain(np.isinf(cycles), layers, "no tiling of it fits the buffers of the accelerator")
        return Costs(cycles / (chip.clock_mhz * 1e3), energy_nj / 1e6)


def _read_cache(file: Path) -> Priced:
    """The costs in the cache; none where it is missing, damaged, or holds what no layer costs."""
    try:
        found = file.stat()
    except OSError:
        return {}
    return _parsed(file, (found.st_ino, found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=2)  # a search asks hundreds of times
def _parsed(file: Path, version: tuple[int, ...]) -> Priced:
    arrays = read_cache(file, {"layers": ((None, len(COLUMNS)), "int64"), "costs": ((None, 2), "float64")})
    if arrays is None:
        return {}
    rows, costs = arrays["layers"], arrays["costs"]
    possible = len(rows) == len(costs) == len(np.unique(rows, axis=0)) and np.isfinite(costs).all()
    if not possible or (costs[:, 0] <= 0).any() or (costs[:, 1] < 0).any():
        return {}
    return dict(zip(map(tuple, rows.tolist()), map(tuple, costs.tolist()), strict=True))


def _dense_convs(chip: Accelerator, rows: np.ndarray) -> tuple[np.ndarray, DenseConvs]:
    """(n,) times that each layer runs its dense convolution, and these convolutions."""
    c, d, side, kernel, stride, groups, w, a, image = rows.T
    depthwise = (groups > 1) & (groups == c) & (groups == d)
    block = DEPTHWISE_CHANNELS * fusion_factor(chip, w, a)
    times = np.where(depthwise, ceil_div(c, block), groups)
    c, d = np.where(depthwise, block, c // groups), np.where(depthwise, block, d // groups)
    return times, DenseConvs(kernel, stride, c, d, ceil_div(side, stride), w, a, image)
