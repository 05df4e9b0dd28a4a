"""The BitFusion cost model: milliseconds and millijoules of convolutions on an accelerator.

A convolution is cut into tiles of o x o output positions, c input channels and d output channels; four loops (output
width and height, input channels, output channels) run over the tiles. For every tiling that fits the buffers and every
loop order, compute cycles and DRAM traffic are counted; the fastest wins, of equals the one with the least energy.
Source: Sharma et al., ISCA 2018; details fitted to the cost table that APQ (CVPR 2020) published.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from apq.errors import UserError
from apq.layers import ConvLayer
from apq.space import FULL_PRECISION
from lut.accelerator import Accelerator

SHAPE = ("in_channels", "out_channels", "input_size", "kernel_size", "stride", "groups", "w_bits", "a_bits")
COLUMNS = (*SHAPE, "image_input")
DEPTHWISE_CHANNELS = 8  # channels that a depthwise layer runs at once at the highest precision
# Tile loops, innermost first: S output width or height, I input channels, O output channels. Width and height have
# equal counts and move the same operands, so swapping them changes nothing: 12 orders stand for all 24.
ORDERS = tuple(sorted({"".join(order) for order in itertools.permutations("SSIO")}))
CHUNK_TILINGS = 1 << 15  # few enough for a chunk's arrays to stay in a core's cache
LARGEST = 1 << 20  # of a layer's sizes: far beyond any network, far within exact arithmetic

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
        Full-precision layers are priced at the most bits that the accelerator has: it computes with integers.
        UserError where a layer is impossible, needs more bits than the accelerator has, or no tiling fits its buffers.
        """
        chip, rows = self.config, _checked_rows(self.config, layers)
        times, convs = _dense_convs(chip, rows)
        distinct, which = np.unique(np.stack(convs, axis=1), axis=0, return_inverse=True)
        which = which.reshape(-1)  # some releases of numpy give it a second axis
        cycles, energy_nj = (times * solved[which] for solved in _solve(chip, _DenseConvs(*distinct.T)))
        _complain(np.isinf(cycles), layers, "no tiling of it fits the buffers of the accelerator")
        return Costs(cycles / (chip.clock_mhz * 1e3), energy_nj / 1e6)


class _DenseConvs(NamedTuple):
    """n dense convolutions, one int64 array `(n,)` a property. `im2col` (0 or 1): its patches lie unrolled in DRAM."""

    kernel: np.ndarray
    stride: np.ndarray
    in_channels: np.ndarray
    out_channels: np.ndarray
    out_side: np.ndarray
    w_bits: np.ndarray
    a_bits: np.ndarray
    im2col: np.ndarray

    def take(self, index: np.ndarray | slice) -> _DenseConvs:
        return _DenseConvs(*(column[index] for column in self))


class _Tilings(NamedTuple):
    """m tilings, one array `(m,)` a property: of the tile unless said otherwise."""

    conv: np.ndarray  # index of the convolution that is tiled; ascending
    w_bits: np.ndarray
    a_bits: np.ndarray
    taps: np.ndarray  # kernel positions; never split
    positions: np.ndarray  # output positions
    pixels: np.ndarray  # input values read of each channel
    in_channels: np.ndarray
    out_channels: np.ndarray
    side_count: np.ndarray  # number of tiles along the output's width, and along its height
    in_count: np.ndarray
    out_count: np.ndarray
    lanes: np.ndarray  # products that a column of the array sums in one cycle
    passes: np.ndarray  # cycles that a column needs for one output value
    column_groups: np.ndarray  # how often the columns must be filled to hold all output channels

    def take(self, index: np.ndarray) -> _Tilings:
        return _Tilings(*(column[index] for column in self))


def _checked_rows(chip: Accelerator, layers: Sequence[ConvLayer]) -> np.ndarray:
    """(n, 9) int64: all that the layers' costs depend on, in the order of `COLUMNS`."""
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


def _dense_convs(chip: Accelerator, rows: np.ndarray) -> tuple[np.ndarray, _DenseConvs]:
    """(n,) how often each layer runs its dense convolution, and these convolutions."""
    c, d, side, kernel, stride, groups, w, a, image = rows.T
    depthwise = (groups > 1) & (groups == c) & (groups == d)
    block = DEPTHWISE_CHANNELS * _fusion_factor(chip, w, a)
    times = np.where(depthwise, _ceil_div(c, block), groups)
    c, d = np.where(depthwise, block, c // groups), np.where(depthwise, block, d // groups)
    return times, _DenseConvs(kernel, stride, c, d, _ceil_div(side, stride), w, a, image)


def _fusion_factor(chip: Accelerator, w_bits: np.ndarray, a_bits: np.ndarray) -> np.ndarray:
    """Products a fusion unit makes a cycle: 6-bit operands run like 8-bit ones, 4-bit ones twice as fast a side."""
    w_factor = chip.max_bits // np.maximum(w_bits, chip.min_bits)
    return w_factor * (chip.max_bits // np.maximum(a_bits, chip.min_bits))


def _solve(chip: Accelerator, convs: _DenseConvs) -> np.ndarray:
    """(2, n) float64: cycles and nanojoules of each convolution; infinite where no tiling fits the buffers."""
    ends = np.cumsum(np.prod(_choices(chip, convs), axis=0))
    cuts = np.flatnonzero(np.diff(ends // CHUNK_TILINGS)) + 1  # chunks also bound the memory
    solved = np.full((2, len(ends)), np.inf)
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(ends)]):
        tilings = _tilings(chip, convs.take(slice(start, stop)))
        held, capacity = _held_bits(chip, tilings), _capacity_bits(chip)
        fits = (held <= capacity).all(axis=0)
        tilings = tilings.take(fits)
        cycles, energy = _cycles_and_energy(chip, tilings, held[:, fits], capacity)
        _keep_best(solved[:, start:stop], tilings.conv, cycles, energy)
    return solved


def _choices(chip: Accelerator, convs: _DenseConvs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) number of sizes that a tile's output side, input channels and output channels can take."""
    out_channels = _ceil_div(convs.out_channels, _smallest_out_channels(chip, convs))
    return _doublings(convs.out_side) + 1, _doublings(convs.in_channels) + 1, _doublings(out_channels) + 1


def _smallest_out_channels(chip: Accelerator, convs: _DenseConvs) -> np.ndarray:
    return np.where(convs.im2col, 1, chip.columns)


def _tilings(chip: Accelerator, convs: _DenseConvs) -> _Tilings:
    """Every tiling of every convolution: powers of two (output channels: times the columns), capped at full size."""
    n_side, n_in, n_out = _choices(chip, convs)
    counts = n_side * n_in * n_out
    conv = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(conv)) - np.repeat(np.cumsum(counts) - counts, counts)
    place, out_choice = np.divmod(place, n_out[conv])
    side_choice, in_choice = np.divmod(place, n_in[conv])

    full = convs.take(conv)
    lanes = chip.rows * _fusion_factor(chip, convs.w_bits, convs.a_bits)[conv]
    side = np.minimum(1 << side_choice, full.out_side)
    in_channels = np.minimum(1 << in_choice, full.in_channels)
    out_channels = np.minimum(_smallest_out_channels(chip, convs)[conv] << out_choice, full.out_channels)
    taps, positions = full.kernel**2.0, side**2.0  # floats, as all products from here on: fast, and exact up to 2**53
    return _Tilings(
        conv=conv,
        w_bits=full.w_bits,
        a_bits=full.a_bits,
        taps=taps,
        positions=positions,
        pixels=np.where(full.im2col, positions * taps, (full.kernel + (side - 1) * full.stride) ** 2.0),
        in_channels=in_channels,
        out_channels=out_channels,
        side_count=_ceil_div(full.out_side, side),
        in_count=_ceil_div(full.in_channels, in_channels),
        out_count=_ceil_div(full.out_channels, out_channels),
        lanes=lanes,
        passes=np.where(full.im2col, _ceil_div(taps * in_channels, lanes), taps * _ceil_div(in_channels, lanes)),
        column_groups=_ceil_div(out_channels, chip.columns),
    )


def _held_bits(chip: Accelerator, t: _Tilings) -> np.ndarray:
    """(3, m) float64: what a tile's weights, activations and outputs occupy on chip, in whole lanes and columns."""
    columns = t.column_groups * chip.columns
    weights = _ceil_div(t.taps * t.in_channels, t.lanes) * t.lanes * columns * _storage_bits(t.w_bits)
    activations = t.pixels * _ceil_div(t.in_channels, t.lanes) * t.lanes * _storage_bits(t.a_bits)
    return np.stack([weights, activations, t.positions * columns * chip.accumulator_bits])


def _storage_bits(bits: np.ndarray) -> np.ndarray:
    """On chip, operands lie in fields of 2, 4, 8 ... bits; DRAM moves their true bits."""
    return np.maximum(2, 1 << _doublings(bits))


def _capacity_bits(chip: Accelerator) -> np.ndarray:
    """(3, 1) room for weights, activations and outputs: half of each buffer, as the other half is being refilled."""
    return np.array([[chip.weight_buffer_bytes], [chip.activation_buffer_bytes], [chip.output_buffer_bytes]]) * 8 / 2


def _cycles_and_energy(
    chip: Accelerator, t: _Tilings, held: np.ndarray, capacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(m,) cycles and nanojoules of each tiling, at its best loop order."""
    t = _Tilings(*(column.astype(np.float64) for column in t))
    counts = {"S": t.side_count, "I": t.in_count, "O": t.out_count}
    tiles = t.side_count**2 * t.in_count * t.out_count
    busy = tiles * t.column_groups * t.positions * t.passes
    products = tiles * t.taps * t.in_channels * t.out_channels * t.positions
    weight_bits = t.taps * t.in_channels * t.out_channels * t.w_bits
    activation_bits = t.pixels * t.in_channels * t.a_bits
    output_bits = t.positions * t.out_channels * chip.accumulator_bits

    bandwidth = chip.dram_bits_per_cycle
    cycles, traffic = np.full_like(busy, np.inf), np.full_like(busy, np.inf)
    for order in ORDERS:
        weights, resident_weights = _reuse(order, "IO", counts, weight_bits, held[0], capacity[0])
        activations, resident_activations = _reuse(order, "SI", counts, activation_bits, held[1], capacity[1])
        outputs, resident_outputs = _reuse(order, "SO", counts, output_bits, held[2], capacity[2])
        moved = weights + activations + 2 * outputs  # outputs are written into the buffer and read back out of it
        fill = np.ceil((resident_weights + resident_activations + resident_outputs) / bandwidth)
        fill += np.ceil(resident_outputs / bandwidth)
        total = np.maximum(np.ceil(moved / bandwidth), busy + fill)
        # Within a tiling only traffic tells the energy of equally fast orders apart.
        better = (total < cycles) | ((total == cycles) & (moved < traffic))
        np.copyto(cycles, total, where=better)
        np.copyto(traffic, moved, where=better)
    energy = (
        chip.busy_nj_per_cycle * busy
        + chip.leakage_nj_per_cycle * cycles
        + (chip.weight_read_nj_per_bit * t.w_bits + chip.activation_read_nj_per_bit * t.a_bits) * products
        + chip.dram_nj_per_bit * traffic
    )
    return cycles, energy


def _reuse(
    order: str, movers: str, counts: dict[str, np.ndarray], bits: np.ndarray, held: np.ndarray, capacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(m,) DRAM traffic of one operand, and its traffic at the last point where it still fitted on chip.

    Loops in `movers` move the operand. The others cost nothing while all that the loops inside them touch fits.
    """
    traffic = resident = bits
    for loop in order:
        if loop in movers:
            traffic, held = traffic * counts[loop], held * counts[loop]
            resident = np.where(held <= capacity, traffic, resident)
        else:
            traffic = np.where(held <= capacity, traffic, traffic * counts[loop])
    return traffic, resident


def _keep_best(best: np.ndarray, conv: np.ndarray, cycles: np.ndarray, energy: np.ndarray) -> None:
    """Write into `best` (2, n) the fastest tiling of each convolution that has one."""
    starts = np.flatnonzero(np.diff(conv, prepend=-1))
    if len(starts):
        best[0, conv[starts]] = np.minimum.reduceat(cycles, starts)
        fastest = np.where(cycles == best[0, conv], energy, np.inf)
        best[1, conv[starts]] = np.minimum.reduceat(fastest, starts)


def _ceil_div(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    return -(-a // b)


def _doublings(full: np.ndarray) -> np.ndarray:
    """How often 1 must double to reach `full`."""
    return np.frexp(full - 1)[1].astype(np.int64)  # exact, where a logarithm may round
