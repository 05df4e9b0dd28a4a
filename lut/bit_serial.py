"""HAQ's accelerators: bit-serial arrays, whose time grows with the bits of weights and with those of activations.

HAQ (Wang et al., CVPR 2019, arXiv 1811.08886) prices networks on BISMO (Umuroglu et al., FPL 2018, arXiv 1806.08862),
a bit-serial matrix multiplier for FPGAs. It published one table, of MobileNetV2 on its cloud accelerator at batch 16
(`qmobilenetv2_imagenet100_batch16_latency_table.npy`). This model gives the cells of it to the cycle; `lut.bit_planes`
says how a product of matrices runs. The constants, and where they come from:

| constant | cloud (VU9P) | edge (Zynq-7020) | source |
| --- | --- | --- | --- |
| `batch` | 16 | 1 | cloud: the table's name; edge: one image, as on a device |
| `rows` x `columns` | 16 x 16 | 8 x 8 | cloud: the table; edge: BISMO's README, 8 x 256 x 8 for this chip |
| `word_bits` | 256 | 256 | cloud: the table; edge: the same README |
| `port_bits` | 256 | 64 | cloud: the table; edge: `memDataBits` of BISMO's `PYNQZ1Params` |
| `buffer_words` | 1,024 | 1,024 | cloud: the table; edge: LMEM and RMEM of BISMO's Makefile |
| `clock_mhz` | 200 | 200 | BISMO's README; the table's unit is not documented |
| `max_bits` | 8 | 8 | HAQ, section 1: BISMO multiplies 1 to 8 bits |

"The table" means fitted to it. BISMO's code is https://github.com/EECS-NTNU/bismo: its Makefile, and
src/main/scala/Main.scala (`ChiselMain`), which makes memories of LMEM and RMEM words for each row and column, and
builds with `PYNQZ1Params`: the board with this chip, in its library maltanar/fpga-tidbits. HAQ published no table of
the edge: its numbers are BISMO's for the chip, and were compared with nothing. Ratios of latencies do not depend on the
clock.

HAQ published no energies of these accelerators, so there are none here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from apq.bounds import is_number
from apq.errors import UserError
from apq.files import Record
from apq.layers import ConvLayer
from apq.limits import LARGEST_LAYER
from lut.accelerator import LARGEST
from lut.bit_planes import Array, Products, cycles
from lut.cost_model import CostModel
from lut.layer_rows import BITS, at_most_bits, checked_rows
from lut.tilings import ceil_div


@dataclass(frozen=True, kw_only=True)
class BitSerial(CostModel):
    """A bit-serial array (default: HAQ's cloud accelerator). UserError where a value is bad.

    `price` has the milliseconds of all `batch` images together, as HAQ's table and paper do, and no energies (NaN).
    """

    batch: int = 16
    rows: int = 16  # pixels, or images of a fully connected layer, that are multiplied at once
    columns: int = 16  # output channels
    word_bits: int = 256  # values along the depth of a product (input channels x kernel)
    port_bits: int = 256  # that each of the two operands loads in a cycle
    buffer_words: int = 1024  # of each row and of each column
    clock_mhz: float = 200.0
    max_bits: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole, most = name != "clock_mhz", LARGEST if name == "clock_mhz" else LARGEST_LAYER
            if not is_number(value) or not 0 < value <= most or (whole and not isinstance(value, int)):
                kind = "whole" if whole else "positive"
                raise UserError(f"bit-serial: {name} must be a {kind} number above 0, at most {most:g}, not {value!r}")

    def __str__(self) -> str:
        names = [name for name, model in NAMED.items() if model == self]
        fields = ", ".join(f"{name} {value}" for name, value in asdict(self).items())
        images = "1 image" if self.batch == 1 else f"{self.batch} images together"
        return f"{names[0] if names else f'bit-serial with {fields}'} ({images}; it has no energies)"

    def price(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers, 2) float64 milliseconds of `batch` images, and NaN for the energies that are not known.

        UserError where a layer is impossible or has more bits than the array.
        """
        return self._priced(checked_rows(self.max_bits, layers))

    def price_rows(self, rows: np.ndarray) -> np.ndarray:
        """See `CostModel.price_rows`."""
        rows = at_most_bits(rows, self.max_bits)
        return np.where((rows[:, BITS] <= self.max_bits).all(axis=1, keepdims=True), self._priced(rows), np.inf)

    def _priced(self, rows: np.ndarray) -> np.ndarray:
        ms = self._cycles_of(rows) / (self.clock_mhz * 1e3)
        return np.stack([ms, np.full(len(rows), np.nan)], axis=1)

    def cycles(self, layers: Sequence[ConvLayer]) -> np.ndarray:
        """(layers,) float64 cycles of each layer for `batch` images. Full precision costs as much as the most bits.

        A convolution runs image by image. A fully connected layer has the images as rows. A depthwise layer runs
        channel by channel: a row is the same place of as many images as the array has columns. (The table would allow
        16 channels of one image as well, and has no kernels but 3x3.) Other grouped layers cost `groups` times the
        convolution of one group.
        """
        return self._cycles_of(checked_rows(self.max_bits, layers))

    def _cycles_of(self, rows: np.ndarray) -> np.ndarray:
        c, d, side, kernel, stride, groups, w, a = rows[:, :8].astype(np.float64).T
        places, taps = ceil_div(side, stride) ** 2, kernel**2
        depthwise, connected = (groups > 1) & (groups == c) & (groups == d), (side == 1) & (kernel == 1)
        together = min(self.batch, self.columns)
        dense = Products(np.where(connected, self.batch, places), d / groups, c / groups * taps, w, a)
        many = Products(places, np.full_like(c, together), together * taps, w, a)
        array = Array(
            rows=self.rows,
            columns=self.columns,
            word_bits=self.word_bits,
            port_bits=self.port_bits,
            buffer_words=self.buffer_words,
        )
        channelwise = self.batch // together * cycles(array, many)
        if rest := self.batch % together:
            channelwise += cycles(array, Products(places, np.full_like(c, rest), rest * taps, w, a))
        grouped = np.where(connected, 1, self.batch) * cycles(array, dense)
        return groups * np.where(depthwise, channelwise, grouped)

    def record(self) -> Record:
        """See `CostModel.record`."""
        return {"accelerator": None, "table": None, "cost_model": {"kind": "bit-serial", **asdict(self)}}


NAMED = {
    "bit-serial-cloud": BitSerial(),
    "bit-serial-edge": BitSerial(batch=1, rows=8, columns=8, port_bits=64),
}
"""HAQ's two accelerators, which `--config` takes by name."""
