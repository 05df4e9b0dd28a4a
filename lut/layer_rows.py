"""Layers as rows of whole numbers, checked for an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from apq.errors import UserError
from apq.layers import ConvLayer
from apq.limits import LARGEST_LAYER
from apq.space import FULL_PRECISION

SHAPE = ("in_channels", "out_channels", "input_size", "kernel_size", "stride", "groups", "w_bits", "a_bits")
COLUMNS = (*SHAPE, "image_input")
BITS = slice(6, 8)  # the columns of bits

values_of = attrgetter(*COLUMNS)


def checked_rows(max_bits: int, layers: Sequence[ConvLayer]) -> np.ndarray:
    """(n, 9) int64: the columns `COLUMNS` of the layers, all that their costs on an accelerator depend on.

    Full precision is the most bits, see `at_most_bits`. UserError where a layer is impossible or has more bits than
    that.
    """
    rows = np.array([values_of(layer) for layer in layers]).reshape(len(layers), len(COLUMNS))
    if len(layers) and rows.dtype.kind != "i":
        whole = [all(isinstance(value, (int, np.integer)) for value in values_of(layer)) for layer in layers]
        complain(~np.array(whole), layers, "sizes and bits must be whole numbers")
    rows = at_most_bits(rows, max_bits)
    c, d, groups, bits = rows[:, 0], rows[:, 1], rows[:, 5], rows[:, BITS]
    outside = (rows[:, : len(SHAPE)] < 1) | (rows[:, : len(SHAPE)] > LARGEST_LAYER)
    complain(outside.any(axis=1), layers, f"sizes and bits must be at least 1 and at most {LARGEST_LAYER}")
    complain((c % groups + d % groups) > 0, layers, "its groups do not divide its channels")
    complain((bits > max_bits).any(axis=1), layers, f"the accelerator has at most {max_bits} bits")
    return rows.astype(np.int64, copy=False)


def at_most_bits(rows: np.ndarray, max_bits: int) -> np.ndarray:
    """A copy of rows (n, 9) with full precision as the most bits of an accelerator, which computes with integers."""
    rows = rows.copy()
    rows[:, BITS] = np.where(rows[:, BITS] == FULL_PRECISION, max_bits, rows[:, BITS])
    return rows


def complain(bad: np.ndarray, layers: Sequence[ConvLayer], why: str) -> None:
    """UserError with the reason for the first layer that is bad, if any is."""
    if bad.any():
        layer = layers[int(bad.argmax())]
        shape = ", ".join(f"{name} {value}" for name, value in zip(COLUMNS, values_of(layer), strict=True))
        raise UserError(f"cannot price layer {layer.name or 'without a name'} ({shape}): {why}")
