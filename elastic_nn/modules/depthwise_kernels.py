"""Triton kernels of depthwise convolutions, which need no plan: the same machine code for all sizes of an image.

Images lie in memory channels last, (N, H, W, C), and so do weights, (K, K, C), with an odd K and "same" padding. Sums
are in float32, whatever the type in memory, and their order depends on the sizes alone. Numbers of channels are counted
in units of `WIDTH`, so that the compiler knows what it may load at once.

Sizes are not specialised: Triton would compile a kernel again where one of them is 1 or a multiple of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["positions", "rows", "columns", "units", "other_rows", "other_columns"]


@triton.jit
def _place(p, rows, columns):
    """Image, row and column of a position."""
    return p // columns // rows, p // columns % rows, p % columns


@triton.jit
def _offsets(image, row, column, rows, columns, channels):
    return ((image.to(tl.int64) * rows + row) * columns + column) * channels


@triton.jit(do_not_specialize=SIZES)
def convolve(
    x,
    w,
    out,
    positions,
    rows,
    columns,
    units,
    other_rows,
    other_columns,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A block of the output, or with GRADIENT of the gradient of the input, where `x` is that of the output.

    `positions` are images x rows x columns of `out`. The other rows and columns are those of `x`.
    """
    channels = units * WIDTH
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image, row, column = _place(p, rows, columns)
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for i in range(K):
        for j in tl.static_range(K):
            if GRADIENT:  # of the outputs that this input went into, which are those at whole strides
                down, right = row + K // 2 - i, column + K // 2 - j
                inside = (down >= 0) & (right >= 0) & (down % STRIDE == 0) & (right % STRIDE == 0)
                down, right = down // STRIDE, right // STRIDE
            else:
                down, right = row * STRIDE + i - K // 2, column * STRIDE + j - K // 2
                inside = (down >= 0) & (right >= 0)
            inside = inside & (down < other_rows) & (right < other_columns) & (p < positions)
            at = _offsets(image, down, right, other_rows, other_columns, channels)
            mask = inside[:, None] & (c < channels)[None, :]
            v = tl.load(x + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tap = tl.load(w + (i * K + j) * channels + c, mask=c < channels, other=0.0).to(tl.float32)
            total += v * tap[None, :]
    at = p.to(tl.int64) * channels
    mask = (p < positions)[:, None] & (c < channels)[None, :]
    tl.store(out + at[:, None] + c[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def weight_gradient(
    x,
    grad,
    partials,
    positions,
    rows,
    columns,
    units,
    other_rows,
    other_columns,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradient of a row of taps, (C, 1, 1, K), from some of the positions: `partials` are (parts, C, K, K).

    `positions` are images x rows x columns of `grad`. The other rows and columns are those of `x`. TAPS is the power
    of two from K on.
    """
    channels, i = units * WIDTH, tl.program_id(1)
    c, j = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TAPS)
    total = tl.zeros([POSITIONS, TAPS, CHANNELS], tl.float32)
    for start in range(tl.program_id(2) * POSITIONS, positions, tl.num_programs(2) * POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        image, row, column = _place(p, rows, columns)
        at = p.to(tl.int64) * channels
        mask = (p < positions)[:, None] & (c < channels)[None, :]
        g = tl.load(grad + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        down, right = row * STRIDE + i - K // 2, (column * STRIDE - K // 2)[:, None] + j[None, :]
        inside = ((down >= 0) & (down < other_rows) & (p < positions))[:, None] & (j < K)[None, :]
        inside = inside & (right >= 0) & (right < other_columns)
        at = _offsets(image[:, None], down[:, None], right, other_rows, other_columns, channels)
        mask = inside[:, :, None] & (c < channels)[None, None, :]
        v = tl.load(x + at[:, :, None] + c[None, None, :], mask=mask, other=0.0).to(tl.float32)
        total += g[:, None, :] * v
    at = ((tl.program_id(2) * channels + c)[None, :] * K + i) * K + j[:, None]
    tl.store(partials + at, tl.sum(total, 0), mask=(j < K)[:, None] & (c < channels)[None, :])
