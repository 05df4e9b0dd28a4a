"""Fake quantization as pure functions: codes, forward rules, straight-through gradients, range choice.

PACT (Choi et al., arXiv 1805.06085) learns the clipping range of activations; HAQ (Wang et al., CVPR 2019) and APQ
quantize weights by their largest magnitude, or by a threshold that loses little information at few bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

LARGEST_CLIP = 6.0  # activations are bounded by ReLU6
PIECE = 1 << 20  # elements: 4 MB in float32
FEW_BITS = 5  # below this many bits a clipped range loses less information than the full one


def highest_code(bits: int, *, signed: bool) -> int:
    """Highest code of the linear quantizers. Signed codes are symmetric: the lowest one is its negative.

    >>> highest_code(8, signed=False), highest_code(8, signed=True), highest_code(4, signed=True)
    (255, 127, 7)
    """
    return 2 ** (bits - 1 if signed else bits) - 1


def code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest code in two's complement. A single signed bit holds the sign: -1, 0 or 1.

    >>> code_range(4, signed=True), code_range(4, signed=False), code_range(1, signed=True)
    ((-8, 7), (0, 15), (-1, 1))
    """
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), max(2 ** (bits - 1) - 1, 1)


def quantize_activation(x: Tensor, clip: Tensor, bits: int, *, signed: bool, learn_clip: bool = True) -> Tensor:
    """Clamp to [0, clip] or [-clip, clip] and round to `bits` bits (the sign's included).

    Gradient of x: 1 inside the range, 0 outside, 1/2 on an edge (0 on an edge if the range is not learned).
    Gradient of clip: 1 above the range, -1 below a signed one, half of it on an edge; the step size carries none.
    """
    return _QuantizeActivation.apply(x, clip, highest_code(bits, signed=signed), signed, learn_clip)


def quantize_weight(w: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Clamp to [-clip, clip] and round to `bits` bits, sign included; the gradient passes everywhere."""
    return _QuantizeWeight.apply(w, clip, highest_code(bits, signed=True))


def weight_step(clip: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    """Distance between two values of a quantized weight; never 0, so that an all-zero filter stays zero."""
    return (clip / top).clamp_min(torch.finfo(dtype).tiny)


class _QuantizeActivation(torch.autograd.Function):
    """Written out because autograd would keep six full-size tensors for what needs one."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, clip: Tensor, top: int, signed: bool, learn_clip: bool) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.signed, ctx.learn_clip = signed, learn_clip
        step = clip / top
        # The bounds as numbers are faster, but on a GPU a number would have to be waited for.
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


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Equal tensors in matching flat pieces that stay in a CPU's cache; in one piece on a GPU."""
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products, without writing the products out where the layout allows it."""
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
    """Clipping threshold of |data| whose quantized cumulative histogram diverges least from the clipped one.

    Candidates are the right ends of histogram bins (as many bins as numpy's "sqrt" rule makes on [0, max]), from
    2^(bits-1) + 1 bins on; the score is a Kullback-Leibler-like sum over the cumulative distributions.
    All-zero data: 0.
    """
    magnitude = np.abs(np.asarray(data).ravel())
    largest = float(magnitude.max(initial=0.0))
    if largest == 0.0:
        return 0.0
    counts, edges = np.histogram(magnitude, bins="sqrt", range=(0.0, largest))
    n_levels, n_bins = 2 ** (bits - 1), len(counts)
    if n_levels + 1 > n_bins:
        return largest
    cumulative = np.cumsum(counts) / counts.sum()
    bin_width = edges[1] - edges[0]
    best_score, best = np.inf, largest
    for kept in range(n_levels + 1, n_bins + 1):
        reference = cumulative.copy()
        reference[kept - 1 :] = 1.0
        coarse = _resample(reference[:kept], n_levels)
        candidate = reference.copy()
        candidate[:kept] = _resample(coarse, kept)
        score = _divergence(cumulative, candidate)
        if score < best_score:
            best_score, best = score, (kept + 0.5) * bin_width
    return float(best)


def _resample(values: np.ndarray, n: int) -> np.ndarray:
    return np.interp(np.linspace(0, len(values) - 1, n), np.arange(len(values)), values)


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nansum((p - q) * np.log2(p / q)))
