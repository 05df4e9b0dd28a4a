"""The constants of a bit-flexible systolic array: array, buffers, memory, clock, energy.

The defaults are BitFusion (Sharma et al., ISCA 2018) as APQ and HAQ used it. The energy factors were fitted to the
published APQ cost table; the published DRAM figure is 15 pJ a bit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from apq.bounds import is_number
from apq.errors import UserError
from apq.limits import LARGEST_LAYER

LARGEST = 1e18  # of a constant: all costs are then finite
WHOLE = ("rows", "columns", "max_bits", "min_bits", "accumulator_bits")


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator. Buffers are double buffered: a tile may use half of each. UserError where a value is bad."""

    rows: int = 16  # of fusion units, along the reduction
    columns: int = 32  # of fusion units, along the output channels
    max_bits: int = 8
    min_bits: int = 2
    clock_mhz: float = 500.0
    dram_bits_per_cycle: float = 192.0
    weight_buffer_bytes: float = 65_536.0
    activation_buffer_bytes: float = 32_768.0
    output_buffer_bytes: float = 16_384.0
    accumulator_bits: int = 32  # of a partial sum, on chip and in DRAM
    busy_nj_per_cycle: float = 0.492  # array and buffers while they compute
    leakage_nj_per_cycle: float = 0.4229  # buffers' leakage, every cycle
    weight_read_nj_per_bit: float = 1.38e-5
    activation_read_nj_per_bit: float = 5.7e-6
    dram_nj_per_bit: float = 0.01512

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number, most = is_number(value), LARGEST_LAYER if name in WHOLE else LARGEST
            free = name.endswith(("_per_cycle", "_per_bit")) and not name.startswith("dram_bits")
            if not number or value < 0 or (value == 0 and not free):
                raise UserError(f"accelerator: {name} must be a positive number, not {value!r}")
            if value > most:
                raise UserError(f"accelerator: {name} must be at most {most:g}")
            if name in WHOLE and not isinstance(value, int):
                raise UserError(f"accelerator: {name} must be a whole number, not {value!r}")
        if self.min_bits > self.max_bits or math.log2(self.max_bits) % 1 or math.log2(self.min_bits) % 1:
            raise UserError(
                f"accelerator: min_bits {self.min_bits} and max_bits {self.max_bits} must be powers of two, with "
                "max_bits not below min_bits"
            )


def accelerator_from_dict(data: Any) -> Accelerator:
    """An accelerator from plain data. UserError where a field is unknown or a value is bad."""
    known = [field.name for field in fields(Accelerator)]
    if not isinstance(data, dict):
        raise UserError(f"an accelerator is a JSON object with some of the fields {', '.join(known)}")
    if unknown := sorted(set(data) - set(known)):
        raise UserError(f"unknown fields {', '.join(unknown)}; known: {', '.join(known)}")
    return Accelerator(**data)
