"""Linear fake quantization as pure functions: codes, forward rules, straight-through gradients, choice of the clip.

PACT (Choi et al., arXiv 1805.06085) learns the clip of activations. HAQ (Wang et al., CVPR 2019) and APQ clip weights
at their largest magnitude, or at few bits where little information is lost.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

LARGEST_CLIP = 6.0  # of activations as published, where ReLU6 bounds them
PIECE = 1 << 20  # elements: 4 MB in float32
DIVERGENCES = 1 << 16  # terms of divergences at once: arrays that stay in the cache of a CPU
FEW_BITS = 5  # below this many bits a smaller clip loses less information than the largest magnitude


def highest_code(bits: int, *, signed: bool) -> int:
    """Highest code of the linear quantizers. Signed codes are symmetric: the lowest code is its negative.

    >>> highest_code(8, signed=False), highest_code(8, signed=True), highest_code(4, signed=True)
    (255, 127, 7)
    """
    return 2 ** (bits - 1 if signed else bits) - 1


def code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest code in two's complement. One signed bit has the codes -1, 0 and 1.

    >>> code_range(4, signed=True), code_range(4, signed=False), code_range(1, signed=True)
    ((-8, 7), (0, 15), (-1, 1))
    """
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), max(2 ** (bits - 1) - 1, 1)


def quantize_activation(x: Tensor, clip: Tensor, bits: int, *, signed: bool, learn_clip: bool = True) -> Tensor:
    """Clamp to [0, clip] or [-clip, clip] and round to `bits` bits, sign included.

    Gradient of x: 1 inside the range, 0 outside, 1/2 on an edge (0 on an edge if the clip is not learned).
    Gradient of clip: 1 above the range, -1 below a signed one, half of that on an edge. The scale has no gradient.
    """
    return _QuantizeActivation.apply(x, clip, highest_code(bits, signed=signed), signed, learn_clip)


def quantize_weight(w: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Clamp to [-clip, clip] and round to `bits` bits, sign included. The gradient passes everywhere."""
    return _QuantizeWeight.apply(w, clip, highest_code(bits, signed=True))


def at_least(clip: Tensor, lowest: float) -> Tensor:
    """The clip, or `lowest` where it is smaller. The gradient passes everywhere, so that a clip below can return."""
    return _AtLeast.apply(clip, lowest)


def weight_step(clip: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    """Distance between the values of neighbouring codes. It is never 0, so that an all-zero filter stays zero."""
    return (clip / top).clamp_min(torch.finfo(dtype).tiny)


class _QuantizeActivation(torch.autograd.Function):
    """Written out because autograd would keep six full-size tensors where one is enough."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, clip: Tensor, top: int, signed: bool, learn_clip: bool) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.signed, ctx.learn_clip = signed, learn_clip
        step = clip / top
        # Bounds as numbers are faster, but a GPU would have to wait for them.
        high = clip.item() if x.device.type == "cpu" else clip
        low = -high if signed else (0.0 if x.device.type == "cpu" else torch.zeros_like(clip))
        return torch.clamp(x, low, high).div_(step).round_().mul_(step)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        out, sum_above, sum_other = torch.empty_like(x), 0.0, 0.0
        for x_, grad_, out_ in pieces(x, grad, out):
            # -1 below the range, 0 on its edge, 1 above the edge
            below = torch.add(x_, clip, out=out_).sign_() if ctx.signed else torch.sign(x_, out=out_)
            above = (x_ - clip).sign_()
            if not ctx.learn_clip:
                out_.copy_(grad_ * (below - above == 2))
                continue
            sum_above = sum_above + dot(grad_, above)
            sum_other = sum_other + (dot(grad_, below) if ctx.signed else grad_.sum())
            below.sub_(above).mul_(grad_).mul_(0.5)
        needed = ctx.learn_clip and ctx.needs_input_grad[1]
        return out, (0.5 * (sum_above + sum_other)).reshape(clip.shape) if needed else None, None, None, None


class _AtLeast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, clip: Tensor, lowest: float) -> Tensor:
        return clip.clamp_min(lowest)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split tensors of one shape into matching flat pieces that stay in the cache of a CPU; one piece on a GPU."""
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products, without an array of products where the layout allows it."""
    if a.ndim == 1 and a.dtype == b.dtype:
        return torch.dot(a, b)
    return (a * b).sum()


class _QuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, w: Tensor, clip: Tensor, top: int) -> Tensor:
        step = weight_step(clip, top, w.dtype)
        return torch.clamp(w, -clip, clip).div_(step).round_().mul_(step)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


def kl_clip(data: np.ndarray, bits: int) -> float:
    """The clip of |data| at which the quantized cumulative histogram diverges least from the clipped one.

    Candidates are the right ends of histogram bins (numpy's "sqrt" rule on [0, max]), from 2^(bits-1) + 1 bins on. The
    divergence is a Kullback-Leibler-like sum over the cumulative distributions. All-zero data gives 0.
    """
    magnitude = np.abs(np.asarray(data).ravel())
    largest = float(magnitude.max(initial=0.0))
    if largest == 0.0:
        return 0.0
    counts, edges = np.histogram(magnitude, bins="sqrt", range=(0.0, largest))
    n_codes, n_bins = 2 ** (bits - 1), len(counts)
    if n_codes + 1 > n_bins:
        return largest
    cumulative, candidates = np.cumsum(counts) / counts.sum(), np.arange(n_codes + 1, n_bins + 1)
    at_once = 1 + DIVERGENCES // n_bins
    parts = np.split(candidates, range(at_once, len(candidates), at_once))
    divergence = np.concatenate([_divergence(cumulative, kept[:, None], n_codes) for kept in parts])
    least = np.argmin(divergence)
    if divergence[least] == np.inf:
        return largest
    return float((int(candidates[least]) + 0.5) * (edges[1] - edges[0]))


def _divergence(cumulative: np.ndarray, kept: np.ndarray, n_codes: int) -> np.ndarray:
    """(n,) divergences of a cumulative histogram, clipped after `kept` (n, 1) bins and quantized to `n_codes`."""
    bins = np.arange(len(cumulative))
    clipped = np.where(bins < kept - 1, cumulative, 1.0)
    coarse = _between(clipped, _even(kept - 1, np.arange(n_codes), n_codes - 1))
    fine = _between(coarse, _even(n_codes - 1, np.minimum(bins, kept - 1), kept - 1))
    quantized = np.where(bins < kept, fine, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum((cumulative - quantized) * np.log2(cumulative / quantized), axis=1)


def _even(end: np.ndarray | int, which: np.ndarray, n_steps: np.ndarray | int) -> np.ndarray:
    """Places `which` of 0 to `n_steps`, evenly from 0 to `end`, which the last place is exactly."""
    return np.where((which == n_steps) & (which > 0), end, which * (end / np.maximum(n_steps, 1)))


def _between(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Each row of values, interpolated linearly at its places: as `np.interp`, for all rows at once."""
    left = places.astype(np.int64)
    right = np.minimum(left + 1, values.shape[1] - 1)
    low, high = (np.take_along_axis(values, index, axis=1) for index in (left, right))
    return (high - low) * (places - left) + low
