"""Augmentation of whole batches as tensor operations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_affine(images: Tensor, *, degrees: float, shift: float, scale: float, shear: float) -> Tensor:
    """Rotate, move, scale and shear each image of a batch by its own random amount (torch's global generator).

    images: (N, C, H, W); `degrees` and `shear` (as a slope) bound both signs, `shift` is a share of the side, `scale`
    0.2 means 0.8 to 1.2. What comes in from outside repeats the border.
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
