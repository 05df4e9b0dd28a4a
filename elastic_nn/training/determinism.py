"""Equal results of equal runs on a GPU, by torch's deterministic algorithms."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

CUBLAS, WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"  # without it torch refuses matrix products, see its manual


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool = True) -> Iterator[None]:
    """Context in which torch computes by deterministic algorithms alone, if it is `wanted`, and as before otherwise.

    On a GPU the same run then gives the same bits. An operation that has no such algorithm raises a RuntimeError, which
    `apq.exits` tells in a line. cuBLAS reads its variable at the first matrix product of a process: a context that
    begins later must find it set.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(CUBLAS, WORKSPACE)
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags
