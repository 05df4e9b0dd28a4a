"""Linear quantizers as modules: they own the range and the bits, `functional` does the arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from apq.errors import UserError
from elastic_nn.quantizers.base import Quantizer
from elastic_nn.quantizers.functional import (
    FEW_BITS,
    LARGEST_CLIP,
    highest_code,
    kl_clip,
    quantize_activation,
    quantize_weight,
    weight_step,
)

SAMPLE = 1_000_000  # activations that a threshold is chosen on
SMALLEST_RANGE = 1e-4  # a learned range that training drove to zero would divide by zero


class LinearActivationQuantizer(Quantizer):
    """PACT-style activation quantizer with one learned clipping range per layer.

    `signed` activations (the linear bottlenecks) spend one of their bits on the sign.
    """

    def __init__(self, signed: bool) -> None:
        super().__init__(signed)
        self.range = nn.Parameter(torch.full((1,), LARGEST_CLIP))
        self._calibrated = False

    def quantize(self, v: Tensor) -> Tensor:
        return quantize_activation(v, self._clip(), self.bits, signed=self.signed)

    def _clip(self) -> Tensor:  # (1,)
        return self.range.clamp_min(SMALLEST_RANGE)

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Set the range to the largest magnitude, at few bits to the KL threshold, at most to 6.

        Of several calls the largest range counts.
        """
        magnitude_bits = self.bits - 1 if self.signed else self.bits
        largest = v.abs().max().item()
        if magnitude_bits < FEW_BITS:
            largest = min(largest, kl_clip(_sample(v), magnitude_bits))
        chosen = max(min(largest, LARGEST_CLIP), SMALLEST_RANGE)
        self.range.fill_(max(chosen, self.range.item()) if self._calibrated else chosen)
        self._calibrated = True

    @torch.no_grad()
    def forget(self) -> None:
        self.range.fill_(LARGEST_CLIP)
        self._calibrated = False

    @property
    def code_range(self) -> tuple[int, int]:
        top = highest_code(self.bits, signed=self.signed)
        return -top if self.signed else 0, top

    @torch.no_grad()
    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self._clip() / highest_code(self.bits, signed=self.signed)
        return scale, torch.zeros_like(scale)


class LinearWeightQuantizer(Quantizer):
    """Weight quantizer whose range is the largest magnitude of the filter in use, or a calibrated threshold.

    A `range` of 0 or less means: not calibrated, use the largest magnitude of each filter. No subnet then depends on
    what another one did.
    """

    def __init__(self) -> None:
        super().__init__(signed=True)
        self.register_buffer("range", torch.full((1,), -1.0))

    def quantize(self, v: Tensor) -> Tensor:
        return quantize_weight(v, self._clip(v), self.bits)

    def _clip(self, w: Tensor) -> Tensor:  # (1,)
        return torch.where(self.range > 0, self.range, w.detach().abs().max())  # no branch: a GPU need not wait

    @property
    def calibrated(self) -> bool:
        """Whether the range is a threshold and does not follow the weights."""
        return bool(self.range > 0)

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Set the range to the KL threshold of the filter at few bits, otherwise follow its largest magnitude.

        Of several calls the largest threshold counts.
        """
        if self.bits < FEW_BITS:
            self.range.fill_(max(kl_clip(v.float().cpu().numpy(), self.bits), self.range.item()))
        else:
            self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        self.range.fill_(-1.0)

    @property
    def code_range(self) -> tuple[int, int]:
        top = highest_code(self.bits, signed=True)
        return -top, top

    @torch.no_grad()
    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of every quantizer. Without a calibrated threshold the range follows the weights `v`, which are needed."""
        if v is None and not self.calibrated:
            raise UserError(f"the weight range of {self.label} follows its weights: give the weights")
        clip = self.range if v is None else self._clip(v)
        scale = weight_step(clip, highest_code(self.bits, signed=True), clip.dtype if v is None else v.dtype)
        return scale, torch.zeros_like(scale)


def _sample(x: Tensor) -> np.ndarray:
    """At most `SAMPLE` values of a tensor, always the same positions: a histogram needs no more."""
    flat = x.flatten()
    if flat.numel() > SAMPLE:
        generator = torch.Generator().manual_seed(0)
        flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=generator).to(flat.device)]
    return flat.float().cpu().numpy()
