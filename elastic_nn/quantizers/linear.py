"""Linear quantizers as modules: they own the range and the bits, `functional` does the arithmetic.

`bits` and `enabled` (False: pass through unquantized) are run-time state. Ranges are parameters or buffers, so they are
saved.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from elastic_nn.quantizers.functional import (
    CALIBRATION_CEILING,
    FEW_BITS,
    kl_threshold,
    levels,
    quantize_activation,
    quantize_weight,
)

SAMPLE = 1_000_000  # activations that a threshold is chosen on
SMALLEST_RANGE = 1e-4  # a learned range that training drove to zero would divide by zero


class LinearActivationQuantizer(nn.Module):
    """PACT-style activation quantizer with one learned clipping range a layer.

    `signed` activations (the linear bottlenecks) spend one of their bits on the sign.
    """

    def __init__(self, signed: bool) -> None:
        super().__init__()
        self.signed = signed
        self.bits, self.enabled = 8, True
        self.range = nn.Parameter(torch.full((1,), CALIBRATION_CEILING))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        return quantize_activation(x, self.range.clamp_min(SMALLEST_RANGE), self.bits, signed=self.signed)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the range from a sample of inputs: their largest magnitude, at few bits the KL threshold, at most 6."""
        magnitude_bits = self.bits - 1 if self.signed else self.bits
        largest = x.abs().max().item()
        if magnitude_bits < FEW_BITS:
            largest = min(largest, kl_threshold(_sample(x), magnitude_bits))
        self.range.fill_(max(min(largest, CALIBRATION_CEILING), SMALLEST_RANGE))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, top_code={levels(self.bits, signed=self.signed)}"


class LinearWeightQuantizer(nn.Module):
    """Weight quantizer whose range is the largest magnitude of the filter in use, or a calibrated threshold.

    A `range` of 0 or less means: not calibrated, take the largest magnitude anew at every call. So nothing that one
    subnet did is remembered by the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bits, self.enabled = 8, True
        self.register_buffer("range", torch.full((1,), -1.0))

    def forward(self, w: Tensor) -> Tensor:
        if not self.enabled:
            return w
        clip = torch.where(self.range > 0, self.range, w.detach().abs().max())  # no branch: a GPU need not wait
        return quantize_weight(w, clip, self.bits)

    @property
    def calibrated(self) -> bool:
        return bool(self.range > 0)

    @torch.no_grad()
    def calibrate(self, w: Tensor) -> None:
        """Set the range from the filter: its KL threshold at few bits, otherwise follow its largest magnitude."""
        if self.bits < FEW_BITS:
            self.range.fill_(kl_threshold(w.float().cpu().numpy(), self.bits))
        else:
            self.range.fill_(-1.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def _sample(x: Tensor) -> np.ndarray:
    """At most `SAMPLE` values of a tensor, always the same places: a histogram needs no more."""
    flat = x.flatten()
    if flat.numel() > SAMPLE:
        generator = torch.Generator().manual_seed(0)
        flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=generator).to(flat.device)]
    return flat.float().cpu().numpy()
