"""Augmentation of batches by tensor operations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_affine(images: Tensor, *, degrees: float, shift: float, scale: float, shear: float) -> Tensor:
    """Rotate, shift, scale and shear each image of a batch at random: (N, C, H, W) -> same.

    Amounts are uniform up to a bound of either sign: `degrees`, `shift` (a fraction of the side), `scale` (0.2: 0.8
    to 1.2) and `shear` (a slope). Pixels outside the image repeat its border. Random numbers come from torch's global
    generator.
    """
    n = len(images)
    draw = 2 * torch.rand(5, n, device=images.device) - 1  # (5, N) in [-1, 1]
    angle, zoom = draw[0] * math.radians(degrees), 1 + draw[1] * scale
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    lean = draw[2] * shear
    matrix = torch.stack(
        [cos, lean * cos - sin, 2 * shift * draw[3], sin, lean * sin + cos, 2 * shift * draw[4]], dim=1
    ).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (N, C, H, W) by its own Gaussian of width `sigma` (N,), in pixels, at most 1.5."""
    n, c, h, w = images.shape
    x = torch.arange(-4, 5, device=images.device)
    kernel = (-0.5 * (x / sigma.clamp(min=1e-3)[:, None]) ** 2).exp()  # (N, 9)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)
    rows = F.pad(images.reshape(1, n * c, h, w), (4, 4, 4, 4), mode="replicate")
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=n * c)
    return F.conv2d(rows, kernel[:, None, :, None], groups=n * c).view(n, c, h, w)


def random_strokes(n: int, strokes: int, side: int, *, width: float) -> Tensor:
    """Images of straight strokes at random places and of random strengths, 0 to 1: (n, 1, side, side).

    Where strokes cross, the strongest counts. `width` is in pixels. Strokes end up to a fifth of the side outside the
    image. Random numbers come from torch's global generator.
    """
    ends = (torch.rand(n, strokes, 2, 2, 1) * 1.4 - 0.2) * side  # (n, strokes, end, x or y, 1)
    start, along = ends[:, :, 0], ends[:, :, 1] - ends[:, :, 0]
    centres = torch.arange(side) + 0.5
    pixels = torch.stack([centres.repeat(side), centres.repeat_interleave(side)])  # (2, side * side)
    away = pixels - start  # (n, strokes, 2, side * side)
    fraction = ((away * along).sum(2, keepdim=True) / (along**2).sum(2, keepdim=True).clamp(min=1e-6)).clamp(0, 1)
    distance = (away - fraction * along).norm(dim=2)
    ink = (width / 2 + 0.5 - distance).clamp(0, 1) * torch.rand(n, strokes, 1)
    return ink.amax(1).view(n, 1, side, side)
