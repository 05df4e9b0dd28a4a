"""Spaces of one bit-width: the same architectures at another number of bits."""

from __future__ import annotations

import re
from dataclasses import replace

from apq.space import FULL_PRECISION, SearchSpace

BITS_SUFFIX = re.compile(r"-([2-8])bit$")  # `oqa-mbv3-2bit` is `oqa-mbv3` at 2 bits; `oqa-mbv3` itself has 4


def at_bits(space: SearchSpace, bits: int) -> SearchSpace:
    """The same architectures at one bit-width throughout, as OQA's are."""
    base = BITS_SUFFIX.sub("", space.name)
    return replace(
        space,
        name=f"{base}-{bits}bit",
        operands=tuple(replace(kind, choices=(bits,)) for kind in space.operands),
        forbidden=(),  # rules forbid choices of bits, and here there is one choice
        mix_activation_bits=bits,
        fixed_bits=bits,
        classifier_bits=None,
        shared_operands=(),
    )


def all_bits(space: SearchSpace) -> set[int]:
    """All bit-widths that occur in the networks of a space, without full precision."""
    chosen = {bits for operand in (*space.operands, *space.shared_operands) for bits in operand.choices}
    of_all = {space.fixed_bits, space.mix_activation_bits, space.end_bits, space.bits_of_classifier}
    return chosen | (of_all - {FULL_PRECISION})


def bits_throughout(space: SearchSpace) -> int | None:
    """The one bit-width of a space's networks; None where bits are searched or differ between layers.

    First convolution and classifier may be in full precision.
    """
    return space.fixed_bits if len(all_bits(space)) == 1 else None


def same_architectures(one: SearchSpace, other: SearchSpace) -> bool:
    """Whether two spaces differ only in bits and names."""
    one, other = (at_bits(space, space.fixed_bits) for space in (one, other))
    same = {"name": other.name, "operands": other.operands}  # kinds of operands say which layers share their bits
    return replace(at_bits(one, other.fixed_bits), **same) == other
