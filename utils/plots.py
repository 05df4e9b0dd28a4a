"""Figures of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apq.files import atomic_open


def plot_history(
    records: Sequence[dict[str, Any]],
    path: Path,
    *,
    constraint: float | None = None,
    unit: str = "",
    quantity: str = "cost",
    title: str | None = None,
) -> None:
    """Write a PNG of a search: predicted accuracy, best and mean, and the best subnet's cost by generation.

    `records` are those of `EvolutionFinder`; `constraint` is drawn as the budget; `quantity` is what costs, in `unit`.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")  # no pyplot: nothing global, no display needed
    FigureCanvasAgg(figure)
    accuracy, cost = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    generations = [record["generation"] for record in records]
    # A search of no generations has one record, which a line alone would not show.
    marker = "o" if len(records) == 1 else None
    for key, label, style in (("best_accuracy", "best", "-"), ("mean_accuracy", "mean of the pool", "--")):
        values = [100 * record[key] for record in records]
        accuracy.plot(generations, values, style, marker=marker, label=label)
    accuracy.set_ylabel("predicted top-1 accuracy (%)")
    cost.plot(generations, [record["best_cost"] for record in records], color="C2", marker=marker, label="best subnet")
    if constraint is not None:
        cost.axhline(constraint, color="black", linewidth=1, linestyle=":", label="budget")
    cost.set_ylabel(f"{quantity} ({unit})" if unit else quantity)
    cost.set_xlabel("generation")
    for axes in (accuracy, cost):
        axes.grid(alpha=0.3)
        axes.legend(loc="best", frameon=False)
    if title:
        figure.suptitle(title)
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
