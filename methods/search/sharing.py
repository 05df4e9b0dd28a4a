"""Independent measurements that the processes share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from elastic_nn.training.distributed import wait
from elastic_nn.training.progress import Progress
from elastic_nn.training.session import Execution


def do_missing(
    wanted: Sequence[int],
    done: Collection[int],
    work: Callable[[int], None],
    execution: Execution,
    *,
    what: str,
    unit: str,
) -> None:
    """Do the `work` of those `wanted` that are not `done`, each process its part, with progress. All wait for all.

    `done` must be the same in all processes.
    """
    missing = [i for i in wanted if i not in done]
    before = (len(wanted) - len(missing)) // execution.world_size
    missing = missing[execution.rank :: execution.world_size]
    for i in Progress(missing, what, before + len(missing), done=before, unit=unit, shown=execution.main):
        work(i)
    wait(execution)
