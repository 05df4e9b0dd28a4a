"""The processes that torchrun started, before torch is imported."""

from __future__ import annotations

import os


def several_processes() -> bool:
    """Whether torchrun started this process, maybe with others."""
    return "WORLD_SIZE" in os.environ


def first_process() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") in ("", "0")


def quieten() -> None:
    """Let torch's own library report errors alone: it repeats each of its warnings in every process.

    DistributedDataParallel warns where it looks for unused parameters and finds none. Which subnets a step runs, and so
    whether it finds any, is drawn anew. Call this before torch is imported.
    """
    if several_processes():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
