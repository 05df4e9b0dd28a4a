"""A front as a printed table, and its measured points beside their predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lut.costs import UNITS
from methods.nsga2.front_finder import Front
from methods.nsga2.front_records import measured_of, spread
from report.search_report import Heading

MOST_SHOWN = 12  # points of a printed front


def front_rows(front: Front, names: Sequence[str], chosen: int, measured: list[int]) -> list[tuple[str, ...]]:
    """Rows of a printed table: some points of the front, measured ones where there are any, and the chosen one."""
    points = measured or list(range(len(front.genes)))
    titles = ("predicted top-1", *(["measured"] if measured else []), *(f"{name}, {UNITS[name]}" for name in names[1:]))
    rows = [(*titles, "")]
    for i in sorted({*(points[k] for k in spread(len(points), MOST_SHOWN)), chosen}):
        top1 = measured_of(front, i)
        beside = [""] if top1 is None else [f"{top1:.2%}"]
        costs = (f"{cost:g}" for cost in front.values[i, 1:])
        mark = "<-" if i == chosen else ""
        rows.append((f"{front.values[i, 0]:.2%}", *(beside if measured else []), *costs, mark))
    return rows


def beside_measured(heading: Heading, front: Front, measured: list[int], how: str, *, learned: bool) -> Heading:
    """The heading with the measured points and how far the predictions are from them.

    `learned`: whether the predictor was trained on those that the rounds of the search measured.
    """
    predicted, top1 = front.values[measured, 0], front.measured[measured]
    gaps = predicted - top1
    mean, absolute = float(gaps.mean()), float(np.abs(gaps).mean())
    line = (
        f"{len(measured)} points measured {how}: predictions are {100 * mean:+.2f} points off on average, "
        f"mean |difference| {100 * absolute:.2f}{' (it was trained on those of its rounds)' if learned else ''}"
    )
    rows = zip(measured, predicted.tolist(), top1.tolist(), strict=True)
    points = [dict(zip(("index", "predicted", "measured"), row, strict=True)) for row in rows]
    facts = {"measured": points, "mean_difference": mean, "mean_absolute_difference": absolute}
    return replace(heading, cautions=[*heading.cautions, line], facts={**heading.facts, **facts})
