"""Several processes under torchrun: their ranks, checks that they agree, sums over all of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from apq.errors import UserError, one_line
from apq.lock import Lock
from apq.processes import several_processes
from elastic_nn.training.determinism import deterministic_algorithms
from elastic_nn.training.session import ONE_PROCESS, Execution

T = TypeVar("T")


@contextlib.contextmanager
def joined(device: torch.device, execution: Execution = ONE_PROCESS) -> Iterator[Execution]:
    """Context that yields the execution with this process's rank and the world size, as torchrun set them.

    The processes can communicate in the block. Without torchrun there is one process. At the end no process waits for
    the others, so that the first can go on alone. All that is computed in the block is as `deterministic` as asked.
    """
    with deterministic_algorithms(execution.deterministic), _connected(device, execution) as own:
        yield own


@contextlib.contextmanager
def _connected(device: torch.device, execution: Execution) -> Iterator[Execution]:
    if not several_processes():
        yield execution
        return
    outermost = not dist.is_initialized()
    if outermost:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The timeout is long because one process may measure subnets for hours while the others wait.
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
        except (RuntimeError, ValueError) as error:  # of the address, of the network
            raise UserError(f"the processes cannot be connected: {one_line(error)}") from error
    try:
        yield replace(execution, rank=dist.get_rank(), world_size=dist.get_world_size())
    finally:
        if outermost:
            dist.destroy_process_group()


@contextlib.contextmanager
def processes(device: torch.device, execution: Execution = ONE_PROCESS) -> Iterator[Execution]:
    """As `joined`, but at the end all processes wait for each other."""
    with joined(device, execution) as own:
        yield own
        wait(own)


@contextlib.contextmanager
def locked_by_first(lock: AbstractContextManager[Lock], execution: Execution) -> Iterator[bool]:
    """Hold a lock for all processes, in the first. Yields whether the killed run before had finished (`Lock.finished`).

    Where it cannot be had, the first process raises its UserError, and the others end without a word.
    """
    with contextlib.ExitStack() as stack:
        yield by_first(lambda: stack.enter_context(lock).finished, execution)


def by_first(work: Callable[[], T], execution: Execution) -> T:
    """What the work of the first process returns, in all processes. The others wait for it.

    Where it raises a UserError, the first process raises it, and the others end without a word.
    """
    error, answer = None, None
    if execution.main:
        try:
            answer = [work()]
        except UserError as raised:
            error = raised
    if execution.world_size > 1:
        everywhere = [answer]
        dist.broadcast_object_list(everywhere)
        answer = everywhere[0]
    if error is not None:
        raise error
    if answer is None:
        sys.exit(2)
    return answer[0]


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
