"""The BitFusion cost model: milliseconds and millijoules of convolutions on an accelerator at batch 1.

Source: Sharma et al., ISCA 2018; details fitted to the cost table that APQ (CVPR 2020) published.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apq.errors import UserError
from apq.files import Record, atomic_open, cache_folder, read_arrays
from apq.layers import ConvLayer
from apq.leftovers import sweep_cache
from apq.space import FULL_PRECISION
from lut.accelerator import Accelerator
from lut.cost_model import CostModel
from lut.tilings import DenseConvs, ceil_div, fusion_factor, solve

SHAPE = ("in_channels", "out_channels", "input_size", "kernel_size", "stride", "groups", "w_bits", "a_bits")
COLUMNS = (*SHAPE, "image_input")
DEPTHWISE_CHANNELS = 8  # channels of a depthwise layer that run at once at the accelerator's most bits
LARGEST = 1 << 20  # size of a layer: far above that of any network, and exact in float64
MODEL_VERSION = 1  # raise it when the cost model changes: caches of other versions are not read

_values_of = attrgetter(*COLUMNS)


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
        missing = [layer for layer in dict.fromkeys(layers) if _values_of(layer) not in cached]
        if missing:
            costs = np.stack(self.cost(missing), axis=1).tolist()
            cached |= {_values_of(layer): tuple(pair) for layer, pair in zip(missing, costs, strict=True)}
            # The costs are right even where the cache cannot be written.
            with contextlib.suppress(OSError, UserError), atomic_open(self.cache_file, "wb") as out:
                rows = np.array(list(cached), dtype=np.int64)
                np.savez(out, layers=rows, costs=np.array(list(cached.values())))
            sweep_cache(self.cache_file.parent)
        return np.array([cached[_values_of(layer)] for layer in layers], dtype=np.float64).reshape(len(layers), 2)

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
        chip, rows = self.config, _checked_rows(self.config, layers)
        times, convs = _dense_convs(chip, rows)
        distinct, which = np.unique(np.stack(convs, axis=1), axis=0, return_inverse=True)
        which = which.reshape(-1)  # some releases of numpy give it a second axis
        cycles, energy_nj = (times * solved[which] for solved in solve(chip, DenseConvs(*distinct.T)))
        _complain(np.isinf(cycles), layers, "no tiling of it fits the buffers of the accelerator")
        return Costs(cycles / (chip.clock_mhz * 1e3), energy_nj / 1e6)


def _read_cache(file: Path) -> dict[tuple[int, ...], tuple[float, float]]:
    try:
        arrays = read_arrays(file)
        rows, costs = arrays["layers"], arrays["costs"]
        if rows.ndim != 2 or rows.dtype.kind != "i" or costs.shape != (len(rows), 2) or not np.isfinite(costs).all():
            return {}
        return {tuple(row): tuple(pair) for row, pair in zip(rows.tolist(), costs.tolist(), strict=True)}
    except (UserError, KeyError, TypeError):
        return {}  # missing or damaged: the costs are computed again


def _checked_rows(chip: Accelerator, layers: Sequence[ConvLayer]) -> np.ndarray:
    """(n, 9) int64: the columns `COLUMNS` of the layers, all that their costs depend on."""
    rows = np.array([_values_of(layer) for layer in layers]).reshape(len(layers), len(COLUMNS))
    if len(layers) and rows.dtype.kind != "i":
        whole = [all(isinstance(value, (int, np.integer)) for value in _values_of(layer)) for layer in layers]
        _complain(~np.array(whole), layers, "sizes and bits must be whole numbers")
    rows[:, 6:8] = np.where(rows[:, 6:8] == FULL_PRECISION, chip.max_bits, rows[:, 6:8])
    c, d, groups, bits = rows[:, 0], rows[:, 1], rows[:, 5], rows[:, 6:8]
    outside = (rows[:, : len(SHAPE)] < 1) | (rows[:, : len(SHAPE)] > LARGEST)
    _complain(outside.any(axis=1), layers, f"sizes and bits must be at least 1 and at most {LARGEST}")
    _complain((c % groups + d % groups) > 0, layers, "its groups do not divide its channels")
    _complain((bits > chip.max_bits).any(axis=1), layers, f"the accelerator has at most {chip.max_bits} bits")
    return rows.astype(np.int64, copy=False)


def _complain(bad: np.ndarray, layers: Sequence[ConvLayer], why: str) -> None:
    if bad.any():
        layer = layers[int(bad.argmax())]
        shape = ", ".join(f"{name} {value}" for name, value in zip(COLUMNS, _values_of(layer), strict=True))
        raise UserError(f"cannot price layer {layer.name or 'without a name'} ({shape}): {why}")


def _dense_convs(chip: Accelerator, rows: np.ndarray) -> tuple[np.ndarray, DenseConvs]:
    """(n,) times that each layer runs its dense convolution, and these convolutions."""
    c, d, side, kernel, stride, groups, w, a, image = rows.T
    depthwise = (groups > 1) & (groups == c) & (groups == d)
    block = DEPTHWISE_CHANNELS * fusion_factor(chip, w, a)
    times = np.where(depthwise, ceil_div(c, block), groups)
    c, d = np.where(depthwise, block, c // groups), np.where(depthwise, block, d // groups)
    return times, DenseConvs(kernel, stride, c, d, ceil_div(side, stride), w, a, image)
