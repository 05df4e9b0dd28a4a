"""Where torch runs."""

from __future__ import annotations

import os

import torch

from apq.errors import UserError


def resolve_device(name: str) -> torch.device:
    """ "auto" takes a GPU when there is one; UserError if a GPU is demanded and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: no CUDA device is available; use --device cpu or auto")
    if available and name in ("auto", "cuda"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # torchrun numbers a machine's processes
    return torch.device("cpu")
