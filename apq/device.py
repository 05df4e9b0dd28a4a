"""The device that torch runs on."""

from __future__ import annotations

import os

import torch

from apq.errors import UserError
from apq.processes import process_number

AUTO = "APQ_DEVICE"  # the environment variable that says what "auto" means: cpu or cuda


def resolve_device(name: str) -> torch.device:
    """The device that --device names: "cpu", "cuda", or "auto" for what APQ_DEVICE says, or else a GPU if there is one.

    Under torchrun each process of a machine gets its own GPU. UserError where there are too few.
    """
    available, flag, remedy = torch.cuda.is_available(), f"--device {name}", "use --device cpu or auto"
    if name == "auto" and os.environ.get(AUTO):
        name = os.environ[AUTO]
        flag, remedy = f"{AUTO}={name}", f"use --device cpu, or unset {AUTO}"
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"the environment variable {AUTO} is {name!r}, not cpu or cuda")
    if name == "cuda" and not available:
        raise UserError(f"{flag}: no CUDA device is available; {remedy}")
    if available and name in ("auto", "cuda"):
        rank = process_number("LOCAL_RANK")  # torchrun numbers a machine's processes
        if rank >= torch.cuda.device_count():
            raise UserError(
                f"there are {torch.cuda.device_count()} GPU(s), none for process {rank}: start one for each"
            )
        return torch.device("cuda", rank)
    return torch.device("cpu")
