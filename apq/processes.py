"""The processes that torchrun started, before torch is imported."""

from __future__ import annotations

import os

from apq.errors import UserError


def several_processes() -> bool:
    """Whether torchrun started this process, maybe with others. UserError where the environment is only half of it."""
    if "WORLD_SIZE" not in os.environ:
        return False
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is set but {', '.join(missing)} not: start the processes with torchrun, or unset WORLD_SIZE"
        )
    rank, world = process_number("RANK"), process_number("WORLD_SIZE")
    if rank >= world:
        raise UserError(f"RANK is {rank}, but there are WORLD_SIZE {world} processes")
    return True


def first_process() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one. UserError as above.

    RANK alone, which other programs set too, means nothing.
    """
    return not several_processes() or process_number("RANK") == 0


def process_number(name: str, default: int = 0) -> int:
    """The whole number in an environment variable that torchrun sets. UserError where it holds anything else."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"the environment variable {name} is {text!r}, not a number of processes, as torchrun sets it")
    return int(text)


def quieten() -> None:
    """Let torch's own library report errors alone: it repeats each of its warnings in every process.

    DistributedDataParallel warns where it looks for unused parameters and finds none. Which subnets a step runs, and so
    whether it finds any, is drawn anew. Call this before torch is imported.
    """
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
