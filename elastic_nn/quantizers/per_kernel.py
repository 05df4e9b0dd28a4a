"""A quantizer for each kernel size of a depthwise layer, for supernets of mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from elastic_nn.quantizers.alternatives import Alternatives
from elastic_nn.quantizers.base import Quantizer


class PerKernel(Alternatives):
    """Holds a quantizer for each kernel size, made by `make`. `set_kernel` chooses the active one.

    Smaller kernels are other weights: the centre of the larger ones, transformed. QFA's depthwise layers have steps,
    offsets and statistics of their own for each kernel size and bit-width (published code, `DynamicSeparableQConv2d`).
    """

    def __init__(self, make: Callable[[], Quantizer], kernel_sizes: Sequence[int]) -> None:
        of_kernel = {str(size): make() for size in kernel_sizes}
        super().__init__(signed=of_kernel[str(kernel_sizes[-1])].signed)
        self.of_kernel = nn.ModuleDict(of_kernel)
        self.kernel = kernel_sizes[-1]

    @property
    def parts(self) -> nn.ModuleDict:
        return self.of_kernel

    @property
    def active(self) -> Quantizer:
        """The quantizer of the present kernel size, at the present bits."""
        part = self.of_kernel[str(self.kernel)]
        part.bits = self.bits
        return part

    def set_kernel(self, kernel_size: int) -> None:
        self.kernel = kernel_size

    def at_kernel(self) -> Quantizer:
        return self.active

    def calibrate(self, v: Tensor) -> None:
        """Calibrate the quantizer of the present kernel size. Calls are combined as by that quantizer."""
        self.active.calibrate(v)

    def restrict(self, choices: Collection[int]) -> None:
        """Drop what only other bit-widths need, for every kernel size."""
        for part in self.of_kernel.values():
            part.restrict(choices)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"
