"""The BitFusion cost model: milliseconds and millijoules of convolutions on an accelerator.

Source: Sharma et al., ISCA 2018; details fitted to the cost table that APQ (CVPR 2020) published.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from apq.errors import UserError
from apq.layers import ConvLayer
from lut.accelerator import Accelerator
from lut.tiling import DenseConvs, ceil_div, fusion_factor, solve

SHAPE = ("in_channels", "out_channels", "input_size", "kernel_size", "stride", "groups", "w_bits", "a_bits")
COLUMNS = (*SHAPE, "image_input")
_values_of = attrgetter(*COLUMNS)


class Costs(NamedTuple):
    """Cost of each of n layers at batch 1: two float64 arrays `(n,)`."""

    latency_ms: np.ndarray
    energy_mj: np.ndarray


class BitFusion:
    """Prices layers on an accelerator (default: the published BitFusion)."""

    def __init__(self, config: Accelerator | None = None) -> None:
        self.config = config or Accelerator()

    def cost(self, layers: Sequence[ConvLayer]) -> Costs:
        """Milliseconds and millijoules of each layer at batch 1.

        A depthwise layer runs in blocks of channels, each as one dense convolution; other grouped layers cost
        `groups` times the dense convolution of one group; a network's first convolution runs in im2col mode.
        UserError where a layer is impossible, needs more bits than the accelerator has, or no tiling fits its buffers.
        """
        chip, rows = self.config, layer_rows(layers)
        c, d, groups, bits = rows[:, 0], rows[:, 1], rows[:, 5], rows[:, 6:8]
        _complain((rows[:, : len(SHAPE)] < 1).any(axis=1), layers, "sizes and bits must be at least 1")
        _complain((c % groups + d % groups) > 0, layers, "its groups do not divide its channels")
        _complain((bits > chip.max_bits).any(axis=1), layers, f"the accelerator has at most {chip.max_bits} bits")

        times, convs = _dense_convs(chip, rows)
        distinct, which = np.unique(np.stack(convs, axis=1), axis=0, return_inverse=True)
        which = which.reshape(-1)  # some releases of numpy give it a second axis
        cycles, energy_nj = (times * solved[which] for solved in solve(chip, DenseConvs(*distinct.T)))
        _complain(np.isinf(cycles), layers, "no tiling of it fits the buffers of the accelerator")
        return Costs(cycles / (chip.clock_mhz * 1e3), energy_nj / 1e6)


def layer_rows(layers: Sequence[ConvLayer]) -> np.ndarray:
    """(n, 9) int64: all that a layer's cost depends on, in the order of `COLUMNS`; UserError if not whole numbers."""
    if not layers:
        return np.zeros((0, len(COLUMNS)), dtype=np.int64)
    rows = np.array([_values_of(layer) for layer in layers])
    if rows.dtype.kind != "i":
        whole = [all(isinstance(value, (int, np.integer)) for value in _values_of(layer)) for layer in layers]
        _complain(~np.array(whole), layers, "sizes and bits must be whole numbers")
    return rows.astype(np.int64, copy=False)


def _dense_convs(chip: Accelerator, rows: np.ndarray) -> tuple[np.ndarray, DenseConvs]:
    """(n,) how often each layer runs its dense convolution, and these convolutions."""
    c, d, side, kernel, stride, groups, w, a, image = rows.T
    depthwise = (groups > 1) & (groups == c) & (groups == d)
    block = chip.depthwise_channels * fusion_factor(chip, w, a)
    times = np.where(depthwise, ceil_div(c, block), groups)
    c, d = np.where(depthwise, block, c // groups), np.where(depthwise, block, d // groups)
    return times, DenseConvs(kernel, stride, c, d, ceil_div(side, stride), w, a, image)


def _complain(bad: np.ndarray, layers: Sequence[ConvLayer], why: str) -> None:
    if bad.any():
        layer = layers[int(bad.argmax())]
        shape = ", ".join(f"{name} {value}" for name, value in zip(COLUMNS, _values_of(layer), strict=True))
        raise UserError(f"cannot price layer {layer.name or 'without a name'} ({shape}): {why}")
