"""Measurement of the pairs that a store lacks, by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apq.files import Record
from apq.space import SearchSpace, space_to_dict
from dataset.pairs import PairStore
from elastic_nn.training.distributed import check_agreement, locked_by_first, wait
from elastic_nn.training.session import Execution

MeasureOwn = Callable[[Sequence[int], int], None]  # indices, number of pairs that earlier runs have measured


def gather_missing(
    store: PairStore, space: SearchSpace, made_by: Record, n: int, execution: Execution, measure_own: MeasureOwn
) -> int:
    """Let each process measure its part of the missing pairs of 0 .. n - 1, and append them to the store.

    Returns how many were missing. No other run can write the store meanwhile. UserError if the pairs in the store were
    made in another way than `made_by`, or if the processes do not agree.
    """
    check_agreement({"space": space_to_dict(space), "pairs": n, **made_by}, execution)
    with locked_by_first(store.locked(), execution):
        missing = store.open(space, made_by, n)
        check_agreement({"pairs (their folder must be shared)": missing}, execution)
        wait(execution)  # no process appends before all have read which are missing
        measure_own(missing[execution.rank :: execution.world_size], (n - len(missing)) // execution.world_size)
        wait(execution)
    return len(missing)
