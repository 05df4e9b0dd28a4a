"""Cycles and energy of a dense convolution on a bit-flexible systolic array.

A convolution is cut into tiles of o x o output positions, c input channels and d output channels. Four loops (output
width, output height, input channels, output channels) run over the tiles. For every tiling that fits the buffers and
every loop order, compute cycles and DRAM traffic are counted. The fewest cycles win, then the least energy.

Source: Sharma et al., ISCA 2018; details fitted to the cost table that APQ (CVPR 2020) published.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from apq.machine import n_cores
from lut.accelerator import Accelerator

# Orders of the tile loops, innermost first: S output width or height, I input channels, O output channels. Width and
# height have equal counts and move the same operands, so 12 orders stand for all 24.
ORDERS = tuple(sorted({"".join(order) for order in itertools.permutations("SSIO")}))
GOOD_ORDER = "SSIO"  # the fastest, or nearly, of most convolutions
POWERS = 2.0 ** np.arange(64)
CHUNK_TILINGS = 1 << 15  # so few that the arrays of a chunk stay in the cache of a core


class DenseConvs(NamedTuple):
    """n dense convolutions: one int64 array `(n,)` a property. `im2col` is 1 where patches are unrolled in DRAM."""

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


class _Tilings(NamedTuple):
    """m tilings: one array `(m,)` a property, of the tile unless the comment says otherwise.

    All but the first are float64: products are fast, and exact up to 2**53.
    """

    conv: np.ndarray  # index of the convolution, ascending
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
    column_groups: np.ndarray  # times that the columns are filled until they have held all output channels

    def take(self, index: np.ndarray) -> _Tilings:
        return _Tilings(*(column[index] for column in self))


class _Work(NamedTuple):
    """What m tilings do: one float64 array `(m,)` a property."""

    busy: np.ndarray  # cycles of the array, all tiles together
    weights: np.ndarray  # bits that a tile reads
    activations: np.ndarray  # bits that a tile reads
    outputs: np.ndarray  # bits that a tile writes


def solve(chip: Accelerator, convs: DenseConvs) -> np.ndarray:
    """(2, n) float64: cycles and nanojoules of each convolution, infinite where no tiling fits the buffers."""
    ends = np.cumsum(np.prod(_choices(chip, convs), axis=0))
    cuts = np.flatnonzero(np.diff(ends // CHUNK_TILINGS)) + 1  # chunks also bound the memory
    solved = np.full((2, len(ends)), np.inf)
    with ThreadPoolExecutor(n_cores()) as pool:
        parts = [
            pool.submit(_solve, chip, convs.take(slice(start, stop)), solved[:, start:stop])
            for start, stop in itertools.pairwise([0, *cuts.tolist(), len(ends)])
        ]
    for part in parts:
        part.result()
    return solved


def _solve(chip: Accelerator, convs: DenseConvs, solved: np.ndarray) -> None:
    """Write cycles and nanojoules of a chunk of convolutions into `solved` (2, n)."""
    tilings = _tilings(chip, convs)
    held, capacity = _held_bits(chip, tilings), _capacity_bits(chip)
    fits = (held <= capacity).all(axis=0)
    tilings, held = tilings.take(fits), held[:, fits]
    quick = _may_be_fastest(chip, tilings, held, capacity)
    tilings = tilings.take(quick)
    cycles, energy = _cycles_and_energy(chip, tilings, held[:, quick], capacity, ORDERS)
    _keep_best(solved, tilings.conv, cycles, energy)


def _may_be_fastest(chip: Accelerator, t: _Tilings, held: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """(m,) bool: which tilings may be the fastest of their convolution, about one in seven.

    The others would need more cycles than the best tiling in one good loop order, even if they moved nothing twice.
    """
    work = _work(chip, t)
    moved = (
        work.weights * t.in_count * t.out_count
        + work.activations * t.side_count**2 * t.in_count
        + 2 * work.outputs * t.side_count**2 * t.out_count
    )
    least = _total_cycles(chip, work.busy, moved, work.weights + work.activations + work.outputs, work.outputs)
    starts = np.flatnonzero(np.diff(t.conv, prepend=-1))
    reached = np.full_like(least, np.inf)
    if len(starts):
        fastest = np.minimum.reduceat(_cycles_and_energy(chip, t, held, capacity, [GOOD_ORDER])[0], starts)
        reached = np.repeat(fastest, np.diff(starts, append=len(t.conv)))
    return least <= reached


def _choices(chip: Accelerator, convs: DenseConvs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) number of choices for a tile's output side, for its input channels and for its output channels."""
    out_channels = ceil_div(convs.out_channels, _smallest_out_channels(chip, convs))
    return _doublings(convs.out_side) + 1, _doublings(convs.in_channels) + 1, _doublings(out_channels) + 1


def _smallest_out_channels(chip: Accelerator, convs: DenseConvs) -> np.ndarray:
    return np.where(convs.im2col, 1, chip.columns)


def _tilings(chip: Accelerator, convs: DenseConvs) -> _Tilings:
    """Every tiling of every convolution: sizes are powers of two (output channels: times the columns), up to the full
    size."""
    n_side, n_in, n_out = _choices(chip, convs)
    counts = n_side * n_in * n_out
    conv = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(conv)) - np.repeat(np.cumsum(counts) - counts, counts)
    place, out_choice = np.divmod(place, n_out[conv])
    side_choice, in_choice = np.divmod(place, n_in[conv])

    full = DenseConvs(*(column.astype(np.float64)[conv] for column in convs))
    lanes = (chip.rows * fusion_factor(chip, convs.w_bits, convs.a_bits)).astype(np.float64)[conv]
    side = np.minimum(POWERS[side_choice], full.out_side)
    in_channels = np.minimum(POWERS[in_choice], full.in_channels)
    out_channels = np.minimum(_smallest_out_channels(chip, convs)[conv] * POWERS[out_choice], full.out_channels)
    taps, positions = full.kernel**2, side**2
    deep = np.where(full.im2col, _ceil(taps * in_channels, lanes), taps * _ceil(in_channels, lanes))
    return _Tilings(
        conv=conv,
        w_bits=full.w_bits,
        a_bits=full.a_bits,
        taps=taps,
        positions=positions,
        pixels=np.where(full.im2col, positions * taps, (full.kernel + (side - 1) * full.stride) ** 2),
        in_channels=in_channels,
        out_channels=out_channels,
        side_count=_ceil(full.out_side, side),
        in_count=_ceil(full.in_channels, in_channels),
        out_count=_ceil(full.out_channels, out_channels),
        lanes=lanes,
        passes=deep,
        column_groups=_ceil(out_channels, chip.columns),
    )


def _held_bits(chip: Accelerator, t: _Tilings) -> np.ndarray:
    """(3, m) float64: bits that a tile's weights, activations and outputs occupy, padded to whole lanes and columns."""
    columns = t.column_groups * chip.columns
    weights = _ceil(t.taps * t.in_channels, t.lanes) * t.lanes * columns * _storage_bits(t.w_bits)
    activations = t.pixels * _ceil(t.in_channels, t.lanes) * t.lanes * _storage_bits(t.a_bits)
    return np.stack([weights, activations, t.positions * columns * chip.accumulator_bits])


def _storage_bits(bits: np.ndarray) -> np.ndarray:
    """Bits of an operand on chip, where it occupies a field of 2, 4, 8, ... bits. DRAM moves its true bits."""
    return np.maximum(2, 1 << _doublings(bits))


def _capacity_bits(chip: Accelerator) -> np.ndarray:
    """(3, 1) bits for weights, activations and outputs: half of each buffer, while the other half is refilled."""
    return np.array([[chip.weight_buffer_bytes], [chip.activation_buffer_bytes], [chip.output_buffer_bytes]]) * 8 / 2


def _cycles_and_energy(
    chip: Accelerator, t: _Tilings, held: np.ndarray, capacity: np.ndarray, orders: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(m,) cycles and nanojoules of each tiling, at the best of these loop orders."""
    counts, work = {"S": t.side_count, "I": t.in_count, "O": t.out_count}, _work(chip, t)
    cycles, traffic = np.full_like(work.busy, np.inf), np.full_like(work.busy, np.inf)
    for order in orders:
        weights, resident_weights = _reuse(order, "IO", counts, work.weights, held[0], capacity[0])
        activations, resident_activations = _reuse(order, "SI", counts, work.activations, held[1], capacity[1])
        outputs, resident_outputs = _reuse(order, "SO", counts, work.outputs, held[2], capacity[2])
        moved = weights + activations + 2 * outputs  # outputs are written into the buffer and read back out of it
        resident = resident_weights + resident_activations + resident_outputs
        total = _total_cycles(chip, work.busy, moved, resident, resident_outputs)
        # Equally fast orders of one tiling differ in energy by their traffic alone.
        better = (total < cycles) | ((total == cycles) & (moved < traffic))
        np.copyto(cycles, total, where=better)
        np.copyto(traffic, moved, where=better)
    products = _tiles(t) * t.taps * t.in_channels * t.out_channels * t.positions
    energy = (
        chip.busy_nj_per_cycle * work.busy
        + chip.leakage_nj_per_cycle * cycles
        + (chip.weight_read_nj_per_bit * t.w_bits + chip.activation_read_nj_per_bit * t.a_bits) * products
        + chip.dram_nj_per_bit * traffic
    )
    return cycles, energy


def _work(chip: Accelerator, t: _Tilings) -> _Work:
    return _Work(
        busy=_tiles(t) * t.column_groups * t.positions * t.passes,
        weights=t.taps * t.in_channels * t.out_channels * t.w_bits,
        activations=t.pixels * t.in_channels * t.a_bits,
        outputs=t.positions * t.out_channels * chip.accumulator_bits,
    )


def _tiles(t: _Tilings) -> np.ndarray:
    return t.side_count**2 * t.in_count * t.out_count


def _total_cycles(
    chip: Accelerator, busy: np.ndarray, moved: np.ndarray, resident: np.ndarray, resident_outputs: np.ndarray
) -> np.ndarray:
    """(m,) cycles: DRAM and array work at the same time, after the buffers were filled. All are in bits but `busy`."""
    fill = np.ceil(resident / chip.dram_bits_per_cycle)
    fill += np.ceil(resident_outputs / chip.dram_bits_per_cycle)
    return np.maximum(np.ceil(moved / chip.dram_bits_per_cycle), busy + fill)


def _reuse(
    order: str, movers: str, counts: dict[str, np.ndarray], bits: np.ndarray, held: np.ndarray, capacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(m,) DRAM traffic in bits of one operand: in total, and of the part that fits on chip.

    Loops in `movers` move the operand. Other loops add no traffic while all that their inner loops touch fits on chip.
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


def fusion_factor(chip: Accelerator, w_bits: np.ndarray, a_bits: np.ndarray) -> np.ndarray:
    """Products per cycle of a fusion unit. 6-bit operands count as 8-bit ones; each 4-bit operand doubles the rate."""
    w_factor = chip.max_bits // np.maximum(w_bits, chip.min_bits)
    return w_factor * (chip.max_bits // np.maximum(a_bits, chip.min_bits))


def ceil_div(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    return -(-a // b)


def _ceil(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """`ceil_div` as floats, ten times as fast. Exact, because sizes are far below 2**53."""
    return np.ceil(a / b)


def _doublings(full: np.ndarray) -> np.ndarray:
    """Number of doublings from 1 to `full` or more."""
    return np.frexp(full - 1)[1].astype(np.int64)  # exact, unlike a rounded logarithm
