"""Triton kernels of the quantizers: one pass over a tensor forward, one backward, and the sums of its blocks.

They compute in float32, whatever the type in memory, by the operations of the pure functions in `functional`, `lsq` and
`affine`, in the same order. `fused` calls them. This module needs Triton, which comes with torch for CUDA.

The programs of a kernel share the blocks of `BLOCK` elements. Backward, each program leaves a row of partial sums. A
kernel of one program adds them up, in an order that only their number determines.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 x 2^23: added to and taken from a float32 below 2^22, it rounds to whole numbers, halves to even. Triton's own
# rounding is a function of CUDA, which its interpreter lacks. The second constant does the same for float64.
ROUNDS, ROUNDS_DOUBLE = tl.constexpr(12582912.0), tl.constexpr(6755399441055744.0)
TINY = tl.constexpr(2.0**-126)  # the smallest normal float32
EPSILON = tl.constexpr(2.0**-23)  # of float32; the smallest step of a range
PARTIALS = tl.constexpr(1024)  # most partial sums, one for each program


@triton.jit
def _rounded(code):
    return (code + ROUNDS) - ROUNDS


@triton.jit
def _clamped(v, low, high):
    return tl.where(v > high, high, tl.where(v < low, low, v))  # NaN stays NaN, as in torch


@triton.jit
def _sign(v):
    return (v > 0).to(tl.float32) - (v < 0).to(tl.float32)


@triton.jit
def _load(x, i, n):
    return tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def _store(x, i, n, v):
    tl.store(x + i, v.to(x.dtype.element_ty), mask=i < n)


@triton.jit
def _sum(partials, count):
    i = tl.arange(0, PARTIALS)
    return tl.sum(tl.load(partials + i, mask=i < count, other=0.0))


# Linear: a clip, which is that of activations or follows from weights


@triton.jit
def _activation_clip(clip, smallest, magnitude):
    size = tl.load(clip).to(tl.float32)
    if magnitude:
        size = tl.abs(size)
    return tl.where(size < smallest, smallest, size)


@triton.jit
def quantize_activation(
    x, out, clip, smallest, top, n, SIGNED: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Clamp to the clip and round to its codes."""
    high = _activation_clip(clip, smallest, MAGNITUDE)
    step = tl.div_rn(high, top)
    low = -high if SIGNED else 0.0
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = _clamped(_load(x, i, n), low, high)
        _store(out, i, n, _rounded(tl.div_rn(v, step)) * step)


@triton.jit
def activation_gradient(
    x, grad, out, partials, clip, smallest, n, SIGNED: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient of x, and partial sums of that of the clip: both have halves on the edges of the range."""
    high, total = _activation_clip(clip, smallest, MAGNITUDE), tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        v, g = _load(x, i, n), _load(grad, i, n)
        above = _sign(v - high)
        below = _sign(v + high) if SIGNED else _sign(v)
        _store(out, i, n, (below - above) * g * 0.5)
        total += g * (above + (below if SIGNED else 1.0)) * 0.5
    tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit
def clip_gradient(partials, count, clip, out, MAGNITUDE: tl.constexpr):
    """Gradient of the clip, from its partial sums."""
    total = _sum(partials, count)
    if MAGNITUDE:
        total *= _sign(tl.load(clip).to(tl.float32))
    tl.store(out, total.to(out.dtype.element_ty))


@triton.jit
def _largest(sizes):
    """Their maximum, or NaN if one of them is NaN, which a maximum on a GPU leaves out."""
    return tl.max(sizes) + tl.sum(tl.where(sizes != sizes, sizes, 0.0))


@triton.jit
def largest_magnitude(w, partials, n, BLOCK: tl.constexpr):
    """The largest magnitude of the blocks of each program."""
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        size = tl.abs(_load(w, start + tl.arange(0, BLOCK), n))
        largest = tl.where((size > largest) | (size != size), size, largest)
    tl.store(partials + tl.program_id(0), _largest(largest))


@triton.jit
def quantize_weight(w, out, partials, count, clip, top, n, BLOCK: tl.constexpr):
    """Clamp to the clip, or where it is not above 0 to the largest magnitude, and round to its codes."""
    i = tl.arange(0, PARTIALS)
    largest = _largest(tl.load(partials + i, mask=i < count, other=0.0))
    high = tl.load(clip).to(tl.float32)
    high = tl.where(high > 0, high, largest)
    step = tl.div_rn(high, top)
    step = tl.where(step < TINY, TINY, step)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        j = start + tl.arange(0, BLOCK)
        v = _clamped(_load(w, j, n), -high, high)
        _store(out, j, n, _rounded(tl.div_rn(v, step)) * step)


# LSQ: a learned step


@triton.jit
def _lsq_step(step):
    size = tl.abs(tl.load(step).to(tl.float32))
    return tl.where(size < TINY, TINY, size)


@triton.jit
def _lsq_codes(exact, low, high, sign_only):
    codes = _clamped(exact, low, high)
    return _sign(codes) if sign_only else _rounded(codes)


@triton.jit
def quantize_lsq(v, out, step, low, high, n, SIGN_ONLY: tl.constexpr, BLOCK: tl.constexpr):
    """Round to multiples of the step within the codes from low to high."""
    size = _lsq_step(step)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        exact = tl.div_rn(_load(v, i, n), size)
        _store(out, i, n, _lsq_codes(exact, low, high, SIGN_ONLY) * size)


@triton.jit
def lsq_gradient(v, grad, out, partials, step, low, high, n, SIGN_ONLY: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of v, and partial sums of that of the step."""
    size, total = _lsq_step(step), tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        exact, g = tl.div_rn(_load(v, i, n), size), _load(grad, i, n)
        inside = (exact > low) & (exact < high)  # NaN is not, as in torch
        _store(out, i, n, tl.where(inside, g, 0.0))
        total += g * (_lsq_codes(exact, low, high, SIGN_ONLY) - tl.where(inside, exact, 0.0))
    tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit
def step_gradient(partials, count, step, out, root):
    """Gradient of the step, from its partial sums; `root` divides it. A step of 0 counts as positive."""
    total = tl.div_rn(_sum(partials, count), root)
    total = tl.where(tl.load(step).to(tl.float32) < 0, -total, total)
    tl.store(out, total.to(out.dtype.element_ty))


# BatchQuant: a range with step and zero point, a learned gain and offset. `affine` points to these four.


@triton.jit
def affine_of_range(low, high, gain, offset, affine, first, last):
    """Step and zero point of a range, computed in float64, beside gain and offset: four numbers."""
    bottom, top = tl.load(low).to(tl.float64), tl.load(high).to(tl.float64)
    bottom, top = tl.where(bottom > 0, 0.0, bottom), tl.where(top < 0, 0.0, top)
    step = (top - bottom) / (last - first)
    step = tl.where(step < EPSILON, EPSILON, step)
    zero_point = first - ((bottom / step + ROUNDS_DOUBLE) - ROUNDS_DOUBLE)
    zero_point = _clamped(zero_point, first, last)
    empty = bottom == top
    tl.store(affine, tl.where(empty, 1.0, step).to(tl.float32))
    tl.store(affine + 1, tl.where(empty, 0.0, zero_point).to(tl.float32))
    tl.store(affine + 2, tl.load(gain).to(tl.float32))
    tl.store(affine + 3, tl.load(offset).to(tl.float32))


@triton.jit
def _affine_codes(v, step, zero_point, gain, offset):
    return tl.div_rn(v * gain, step) + zero_point + offset


@triton.jit
def _affine_values(codes, step, zero_point, gain, offset):
    return tl.div_rn((codes - zero_point - offset) * step, gain)


@triton.jit
def quantize_affine(x, out, affine, first, last, n, BLOCK: tl.constexpr):
    """Round to codes, and back to values."""
    step, zero_point = tl.load(affine), tl.load(affine + 1)
    gain, offset = tl.load(affine + 2), tl.load(affine + 3)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        exact = _affine_codes(_load(x, i, n), step, zero_point, gain, offset)
        codes = _rounded(_clamped(exact, first, last))
        _store(out, i, n, _affine_values(codes, step, zero_point, gain, offset))


@triton.jit
def affine_gradient(x, grad, out, partials, affine, first, last, n, BLOCK: tl.constexpr):
    """Gradient of x, and two rows of partial sums: those of gain, and of what is clipped."""
    step, zero_point = tl.load(affine), tl.load(affine + 1)
    gain, offset = tl.load(affine + 2), tl.load(affine + 3)
    for_gain, clipped = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        v, g = _load(x, i, n), _load(grad, i, n)
        exact = _affine_codes(v, step, zero_point, gain, offset)
        passed = tl.where((exact > first) & (exact < last), g, 0.0)
        _store(out, i, n, passed)
        codes = _rounded(_clamped(exact, first, last))
        for_gain += passed * v - g * _affine_values(codes, step, zero_point, gain, offset)
        clipped += g - passed
    tl.store(partials + tl.program_id(0), tl.sum(for_gain))
    tl.store(partials + PARTIALS + tl.program_id(0), tl.sum(clipped))


@triton.jit
def gain_and_offset_gradients(partials, count, affine, out):
    """Gradients of gain and offset, from their partial sums: two numbers."""
    step, gain = tl.load(affine), tl.load(affine + 2)
    tl.store(out, tl.div_rn(_sum(partials, count), gain))
    tl.store(out + 1, tl.div_rn(-_sum(partials + PARTIALS, count) * step, gain))
