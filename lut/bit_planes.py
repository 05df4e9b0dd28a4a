"""Cycles of matrix products on a bit-serial array: pixels times weights, one bit of each at a time.

A cycle multiplies a block of pixels (`rows`) with a block of output channels (`columns`), over one word of the depth
(`word_bits`), for one bit of the activations and one bit of the weights. A word holds one bit of a pixel's, or of an
output channel's, values along that part of the depth.

- Both operands have a port of their own, which loads words in the order of their first use; a word takes its bits /
  `port_bits` cycles, rounded up. The array works while words arrive, and may use a word in the cycle of its arrival.
- Blocks of one operand are the outer loop, those of the other are the inner one. Within a pair of blocks come the
  parts of the depth, then the bits of the inner operand, then those of the outer one. The operand that takes fewer
  cycles as the outer one is it, for the whole product.
- The buffer of an operand has `buffer_words` words for each row of a block. Where an operand does not fit, it is cut
  into as many tiles of whole blocks as it needs. Every pair of tiles loads both anew. (A single block that is larger
  than the buffer, of a depth above 128 words at 8 bits, is priced as if it fitted.)

This schedule is fitted to HAQ's published table of MobileNetV2, whose cells it gives to the cycle.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from lut.tilings import ceil_div


@dataclass(frozen=True, kw_only=True)
class Array:
    """The sizes of a bit-serial array."""

    rows: int
    columns: int
    word_bits: int
    port_bits: int
    buffer_words: int


class Products(NamedTuple):
    """n products of integer matrices (pixels, depth) x (depth, channels): arrays (n,) of float64, exact to 2^53."""

    pixels: ndarray
    channels: ndarray
    depth: ndarray
    w_bits: ndarray
    a_bits: ndarray


class _Operand(NamedTuple):
    """One side of n products: its rows (n,) and their bits (n,); rows of a block."""

    size: ndarray
    bits: ndarray
    block: int


class _Words(NamedTuple):
    """Words of a row, for each bit: their number (n,), cycles of the last one (n,), cycles of each other."""

    number: ndarray
    last: ndarray
    whole: int


def cycles(array: Array, products: Products) -> ndarray:
    """(n,) float64 cycles of each product."""
    number = ceil_div(products.depth, array.word_bits)
    rest = products.depth - (number - 1) * array.word_bits
    words = _Words(number, ceil_div(rest, array.port_bits), -(-array.word_bits // array.port_bits))
    pixels, channels = products.pixels, products.channels
    p_tiles = _tiles(pixels, ceil_div(pixels * number * products.a_bits, array.rows * array.buffer_words), array.rows)
    c_tiles = _tiles(
        channels, ceil_div(channels * number * products.w_bits, array.columns * array.buffer_words), array.columns
    )
    pixels_outer, channels_outer = np.zeros_like(number), np.zeros_like(number)
    for (p_size, p_times), (c_size, c_times) in itertools.product(p_tiles, c_tiles):
        activations = _Operand(p_size, products.a_bits, array.rows)
        weights = _Operand(c_size, products.w_bits, array.columns)
        pixels_outer += p_times * c_times * _tile_cycles(activations, weights, words)
        channels_outer += p_times * c_times * _tile_cycles(weights, activations, words)
    return np.minimum(pixels_outer, channels_outer)


def _tiles(size: ndarray, number: ndarray, block: int) -> list[tuple[ndarray, ndarray]]:
    """Sizes (n,) of tiles of whole blocks, and how often each occurs (n,): equal tiles, then what is left."""
    tile = ceil_div(ceil_div(size, block), number) * block
    times = size // tile
    rest = size - times * tile
    return [(tile, times), (np.maximum(rest, 1), (rest > 0).astype(np.float64))]


def _tile_cycles(outer: _Operand, inner: _Operand, words: _Words) -> ndarray:
    """(n,) cycles of one tile of each operand.

    Each step takes a cycle and waits for its words, in order. So the last step ends as late as the latest of
    (arrival of a word + steps from its first use on).
    """
    a_pair = words.number * outer.bits * inner.bits  # steps of a pair of blocks
    blocks = ceil_div(inner.size, inner.block)
    steps = ceil_div(outer.size, outer.block) * blocks * a_pair
    first_uses = ((outer, blocks * a_pair, np.ones_like(steps)), (inner, a_pair, outer.bits))
    ends = np.zeros_like(steps)
    for operand, between_blocks, between_bits in first_uses:
        # Lateness is linear in blocks, words and bits, apart from the last block and word, so the ends are enough.
        last_block, last_word = ceil_div(operand.size, operand.block) - 1, words.number - 1
        for block, word, bit in itertools.product(_ends(last_block), _ends(last_word), (0 * steps, operand.bits - 1)):
            rows = np.minimum(operand.block, operand.size - block * operand.block)
            before = words.whole * last_word + words.last  # cycles of one bit of one row
            load = np.where(word == last_word, words.last, words.whole)
            arrival = block * operand.block * operand.bits * before
            arrival += rows * (word * words.whole * operand.bits + (bit + 1) * load)
            first_use = block * between_blocks + word * outer.bits * inner.bits + bit * between_bits
            ends = np.maximum(ends, arrival + steps - first_use - 1)
    return ends


def _ends(last: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """First, last but one and last index."""
    return 0 * last, np.maximum(last - 1, 0), last
