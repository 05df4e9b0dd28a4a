"""Distillation: the outputs of a teacher as labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities as labels (temperature 1)."""
    return F.cross_entropy(logits, teacher_logits.softmax(1))


class TeacherOfBatch:
    """The outputs of a teacher for one batch `x` (N, C, H, W), computed once for each resolution that is asked for.

    If it `follows` the subnets, it sees the images at their resolutions, otherwise `x` itself.
    """

    def __init__(self, teacher: Callable[[Tensor], Tensor] | None, x: Tensor, *, follows: bool) -> None:
        self.teacher, self.x, self.follows = teacher, x, follows
        self.known: dict[int, Tensor] = {}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor | None:
        """Its logits (N, classes) for a subnet that gets `images`, which are `x` resized. None without a teacher."""
        if self.teacher is None:
            return None
        images = images if self.follows else self.x
        if (side := images.size(-1)) not in self.known:
            self.known[side] = self.teacher(images)
        return self.known[side]
