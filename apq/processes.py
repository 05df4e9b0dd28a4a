"""The processes that torchrun started, before torch is imported."""

from __future__ import annotations

import os


def several_processes() -> bool:
    """Whether torchrun started this process, maybe with others."""
    return "WORLD_SIZE" in os.environ


def first_process() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") in ("", "0")
