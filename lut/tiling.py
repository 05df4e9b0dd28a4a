"""Cycles and energy of dense convolutions, each at its best tiling and loop order.

A convolution is cut into tiles of o x o output positions, c input channels and d output channels; four loops (output
width and height, input channels, output channels) run over the tiles. For every tiling that fits the buffers and every
loop order, compute cycles and DRAM traffic are counted; the fastest wins, of equals the one with the least energy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from lut.accelerator import Accelerator

# Tile loops, innermost first: S output width or height, I input channels, O output channels. Width and height have
# equal counts and move the same operands, so swapping them changes nothing: 12 orders stand for all 24.
ORDERS = tuple(sorted({"".join(order) for order in itertools.permutations("SSIO")}))
CHUNK_TILINGS = 1 << 14  # few enough for the arrays of a chunk to stay in a core's cache


class DenseConvs(NamedTuple):
    """n dense convolutions, one int64 array `(n,)` a property. `im2col` (0 or 1): its patches lie unrolled in DRAM."""

    kernel: np.ndarray
    stride: np.ndarray
    in_channels: np.ndarray
    out_channels: np.ndarray
    out_side: np.ndarray
    w_bits: np.ndarray
    a_bits: np.ndarray
    im2col: np.ndarray

    def take(self, index: np.ndarray | slice) -> DenseConvs:
        return DenseConvs(*(column[index] for column in self))


class _Tile(NamedTuple):
    """m tiles: index of the convolution each belongs to, and sizes."""

    conv: np.ndarray
    side: np.ndarray
    in_channels: np.ndarray
    out_channels: np.ndarray


def ceil_div(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """Integer division that rounds up."""
    return -(-a // b)


def fusion_factor(chip: Accelerator, w_bits: np.ndarray, a_bits: np.ndarray) -> np.ndarray:
    """Products a fusion unit makes a cycle: 6-bit operands run like 8-bit ones, 4-bit ones twice as fast a side."""
    w_factor = chip.max_bits // np.maximum(w_bits, chip.min_bits)
    return w_factor * (chip.max_bits // np.maximum(a_bits, chip.min_bits))


def solve(chip: Accelerator, convs: DenseConvs) -> np.ndarray:
    """(2, n) float64: cycles and nanojoules of each convolution; infinite where no tiling fits the buffers."""
    ends = np.cumsum(np.prod(_choices(chip, convs), axis=0))
    cuts = np.flatnonzero(np.diff(ends // CHUNK_TILINGS)) + 1  # chunks bound the memory
    solved = np.full((2, len(ends)), np.inf)
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(ends)]):
        if start < stop:
            solved[:, start:stop] = _solve_chunk(chip, convs.take(slice(start, stop)))
    return solved


def _choices(chip: Accelerator, convs: DenseConvs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) number of sizes that a tile's output side, input channels and output channels can take."""
    return (
        _doublings(convs.out_side) + 1,
        _doublings(convs.in_channels) + 1,
        _doublings(ceil_div(convs.out_channels, _smallest_out_channels(chip, convs))) + 1,
    )


def _doublings(full: np.ndarray) -> np.ndarray:
    """How often 1 must double to reach `full`."""
    return np.frexp(full - 1)[1].astype(np.int64)  # frexp is exact where a logarithm may round


def _smallest_out_channels(chip: Accelerator, convs: DenseConvs) -> np.ndarray:
    return np.where(convs.im2col, 1, chip.cols)


def _tiles(chip: Accelerator, convs: DenseConvs) -> _Tile:
    """Every tiling of every convolution: sizes are powers of two (times the columns), capped at the full size."""
    n_side, n_in, n_out = _choices(chip, convs)
    counts = n_side * n_in * n_out
    conv = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(conv)) - np.repeat(np.cumsum(counts) - counts, counts)
    place, out_choice = np.divmod(place, n_out[conv])
    side_choice, in_choice = np.divmod(place, n_in[conv])
    return _Tile(
        conv,
        np.minimum(1 << side_choice, convs.out_side[conv]),
        np.minimum(1 << in_choice, convs.in_channels[conv]),
        np.minimum(_smallest_out_channels(chip, convs)[conv] << out_choice, convs.out_channels[conv]),
    )


def _solve_chunk(chip: Accelerator, convs: DenseConvs) -> np.ndarray:
    tile = _tiles(chip, convs)
    size = convs.take(tile.conv)
    taps, positions = size.kernel**2, tile.side**2
    read = np.where(size.im2col, positions * taps, (size.kernel + (tile.side - 1) * size.stride) ** 2)
    lanes = chip.rows * fusion_factor(chip, size.w_bits, size.a_bits)  # products that a column sums in one cycle
    in_lanes, tap_lanes = ceil_div(tile.in_channels, lanes), ceil_div(taps * tile.in_channels, lanes)
    col_groups = ceil_div(tile.out_channels, chip.cols)

    # What a tile occupies on chip, in bits: whole lanes and columns, at storage precision.
    weights_held = tap_lanes * lanes * col_groups * chip.cols * _storage_bits(size.w_bits)
    activations_held = read * in_lanes * lanes * _storage_bits(size.a_bits)
    outputs_held = positions * col_groups * chip.cols * chip.accumulator_bits
    # Bits of half a buffer, the other half is being refilled.
    weights_half, activations_half = chip.weight_buffer_bytes * 4, chip.activation_buffer_bytes * 4
    outputs_half = chip.output_buffer_bytes * 4
    fits = (weights_held <= weights_half) & (activations_held <= activations_half) & (outputs_held <= outputs_half)

    tile, size = _Tile(*(column[fits] for column in tile)), size.take(fits)
