"""Several processes under torchrun: their ranks, checks that they agree, sums over all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apq.device import process_number
from apq.errors import UserError, one_line
from elastic_nn.training.session import ONE_PROCESS, Execution


@contextlib.contextmanager
def processes(device: torch.device, execution: Execution = ONE_PROCESS) -> Iterator[Execution]:
    """Context that yields the execution with this process's rank and the world size, as torchrun set them.

    The processes can communicate in the block. Without torchrun there is one process.
    """
    if "WORLD_SIZE" not in os.environ:
        yield execution
        return
    _check_torchrun()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The timeout is long because one process may measure subnets for hours while the others wait.
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    except (RuntimeError, ValueError) as error:  # of the address, of the network
        raise UserError(f"the processes cannot be connected: {one_line(error)}") from error
    try:
        yield replace(execution, rank=dist.get_rank(), world_size=dist.get_world_size())
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _check_torchrun() -> None:
    """UserError unless the environment is one that torchrun makes."""
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is set but {', '.join(missing)} not: start the processes with torchrun, or unset WORLD_SIZE"
        )
    rank, world = (process_number(name) for name in ("RANK", "WORLD_SIZE"))
    if rank >= world:
        raise UserError(f"RANK is {rank}, but there are WORLD_SIZE {world} processes")


def wait(execution: Execution) -> None:
    """Wait for all processes."""
    if execution.world_size > 1:
        dist.barrier()


def check_agreement(record: Mapping[str, Any], execution: Execution) -> None:
    """UserError in all processes if their records differ. It names what differs."""
    if execution.world_size == 1:
        return
    everyone: list[Any] = [None] * execution.world_size
    dist.all_gather_object(everyone, dict(record))
    for rank, other in enumerate(everyone):
        if differ := [key for key in everyone[0] if other.get(key) != everyone[0][key]]:
            raise UserError(f"processes disagree: process {rank} has another {', '.join(differ)} than process 0")


def sum_over(values: Tensor, execution: Execution) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if execution.world_size > 1:
        dist.all_reduce(values)
    return values
