"""Linear quantizers as modules. They hold the clip and the bits; the arithmetic is in `functional`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apq.errors import UserError
from elastic_nn.quantizers import fused
from elastic_nn.quantizers.base import Quantizer
from elastic_nn.quantizers.functional import (
    FEW_BITS,
    LARGEST_CLIP,
    at_least,
    highest_code,
    kl_clip,
    quantize_activation,
    quantize_weight,
    weight_step,
)

SAMPLE = 1_000_000  # most activations that a clip is chosen on
USUAL_CLIP = 3.0  # of activations, which ReLU6 bounds at 6
SMALLEST_RANGE = 1e-30  # below all activations; a clip of zero would divide by zero


class LinearActivationQuantizer(Quantizer):
    """PACT-style activation quantizer with one learned clip a layer, the parameter `range`.

    `signed` activations (linear bottlenecks) spend one bit on the sign. The `published` quantizer differs in two ways:
    its clip is calibrated to at most 6, whatever the network's activation function, and training moves it by amounts
    that do not depend on its size (see `relative_parameters`). Of the other one the magnitude counts.
    """

    def __init__(self, signed: bool, *, published: bool = False) -> None:
        super().__init__(signed)
        self.published = published
        self.range = nn.Parameter(torch.full((1,), LARGEST_CLIP))
        self._calibrated = False  # by calls since the last `forget` or loading

    def quantize(self, v: Tensor) -> Tensor:
        if fused.runs_on(v):
            settings = {"signed": self.signed, "smallest": SMALLEST_RANGE, "magnitude": not self.published}
            return fused.quantize_activation(v, self.range, self.bits, **settings)
        return quantize_activation(v, self._clip(), self.bits, signed=self.signed)

    def _clip(self) -> Tensor:  # (1,)
        return at_least(self.range if self.published else self.range.abs(), SMALLEST_RANGE)

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Set the clip to the largest magnitude, or at few bits to the KL clip; as published to at most 6.

        Of several calls the largest clip counts. That is the clip of all values together, except for KL clips. Values
        that are all zero say nothing: the clip stays.
        """
        magnitude_bits = self.bits - 1 if self.signed else self.bits
        largest = v.abs().max().item()
        if magnitude_bits < FEW_BITS:
            largest = min(largest, kl_clip(_sample(v), magnitude_bits))
        if largest == 0:
            return
        chosen = max(min(largest, LARGEST_CLIP) if self.published else largest, SMALLEST_RANGE)
        self.range.fill_(max(chosen, self.range.item()) if self._calibrated else chosen)
        self._calibrated = True

    def relative_parameters(self) -> dict[nn.Parameter, float]:
        return {} if self.published else {self.range: USUAL_CLIP}

    @torch.no_grad()
    def forget(self) -> None:
        self.range.fill_(LARGEST_CLIP)
        self._calibrated = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
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
    """Weight quantizer whose clip is the largest magnitude of the weights in use, or a calibrated one.

    A `range` of 0 or less means that it is not calibrated: the clip follows the weights, so that subnets of a supernet
    do not depend on each other.
    """

    def __init__(self) -> None:
        super().__init__(signed=True)
        self.register_buffer("range", torch.full((1,), -1.0))
        self._loaded = False  # the range is from a state

    def quantize(self, v: Tensor) -> Tensor:
        if fused.runs_on(v):
            return fused.quantize_weight(v, self.range, self.bits)
        return quantize_weight(v, self._clip(v), self.bits)

    def _clip(self, w: Tensor) -> Tensor:  # (1,)
        return torch.where(self.range > 0, self.range, w.detach().abs().max())  # no branch: a GPU need not wait

    @property
    def calibrated(self) -> bool:
        """Whether the clip is calibrated and does not follow the weights."""
        return bool(self.range > 0)

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """At few bits set the clip to the KL clip of the weights, otherwise let it follow their largest magnitude.

        Of several calls at few bits the largest KL clip counts. A clip that follows the weights covers all calls.
        """
        if self._loaded or self.bits >= FEW_BITS:
            self.forget()
        if self.bits < FEW_BITS:
            self.range.fill_(max(kl_clip(v.float().cpu().numpy(), self.bits), self.range.item()))

    @torch.no_grad()
    def forget(self) -> None:
        self.range.fill_(-1.0)
        self._loaded = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._loaded = True

    @property
    def code_range(self) -> tuple[int, int]:
        top = highest_code(self.bits, signed=True)
        return -top, top

    @torch.no_grad()
    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer`. Without a calibrated clip the weights `v` are needed."""
        if v is None and not self.calibrated:
            raise UserError(f"the weight range of {self.label} follows its weights: give the weights")
        clip = self.range if v is None else self._clip(v)
        scale = weight_step(clip, highest_code(self.bits, signed=True), clip.dtype if v is None else v.dtype)
        return scale, torch.zeros_like(scale)


def _sample(x: Tensor) -> np.ndarray:
    """At most `SAMPLE` values of a tensor, always from the same positions. That is enough for a histogram."""
    flat = x.flatten()
    if flat.numel() > SAMPLE:
        generator = torch.Generator().manual_seed(0)
        flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=generator).to(flat.device)]
    return flat.float().cpu().numpy()
