"""Several processes under torchrun: who am I, do all agree, sums over all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apq.errors import UserError
from dataset.splits import ALONE


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, number) of the processes that torchrun started; (0, 1) without it. Groups live inside the block."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # One process may measure subnets for hours while the others wait for it.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield dist.get_rank(), dist.get_world_size()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def wait(share: tuple[int, int]) -> None:
    """Wait until every process is here."""
    if share[1] > 1:
        dist.barrier()


def check_agreement(asked: Mapping[str, Any], share: tuple[int, int]) -> None:
    """UserError, in all processes, if they were not asked for the same: it names what differs."""
    if share[1] == 1:
        return
    everyone: list[Any] = [None] * share[1]
    dist.all_gather_object(everyone, dict(asked))
    for rank, other in enumerate(everyone):
        if odd := [key for key in everyone[0] if other.get(key) != everyone[0][key]]:
            raise UserError(f"processes disagree: process {rank} has another {', '.join(odd)} than process 0")


def sum_over(values: Tensor, share: tuple[int, int]) -> Tensor:
    """The sum of a tensor over all processes."""
    if share[1] > 1:
        dist.all_reduce(values)
    return values
