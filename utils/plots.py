"""Figures of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apq.files import atomic_open
from apq.layers import ConvLayer
from apq.policy import Policy

STYLES = ("-", "--", ":", "-.")


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
    write_figure(figure, path)


def plot_top1(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, xlabel: str, title: str = ""
) -> None:
    """Write a PNG of top-1 (0 to 1) against something else: a line of (x, top-1) for each name.

    Names that end alike after a comma share a colour, those that begin alike a style.
    """
    percent = {name: (x, 100 * np.asarray(top1)) for name, (x, top1) in lines.items()}
    _plot_lines(percent, path, xlabel=xlabel, ylabel="top-1 accuracy (%)", title=title)


def plot_losses(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, xlabel: str) -> None:
    """Write a PNG of training losses, named as those of `plot_top1`."""
    _plot_lines(lines, path, xlabel=xlabel, ylabel="training loss", title="")


def _plot_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, xlabel: str, ylabel: str, title: str
) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    starts, ends = (list(dict.fromkeys(name.rpartition(", ")[i] for name in lines)) for i in (0, 2))
    for name, (x, y) in lines.items():
        start, _, end = name.rpartition(", ")
        style = STYLES[starts.index(start) % len(STYLES)]
        axes.plot(x, y, style, marker="o", color=f"C{ends.index(end)}", label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_figure(figure, path)


def plot_episodes(records: Sequence[dict[str, Any]], path: Path, *, original: float) -> None:
    """Write a PNG of an agent's search: accuracy of every episode and of the best so far, and the `original` one."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    episodes = [record["episode"] for record in records]
    accuracies = 100 * np.array([record["accuracy"] for record in records])
    axes.plot(episodes, accuracies, ".", markersize=4, color="C0", label="episode")
    axes.plot(episodes, np.maximum.accumulate(accuracies), color="C1", label="best so far")
    axes.axhline(100 * original, color="black", linewidth=1, linestyle=":", label="before quantization or pruning")
    axes.set_xlabel("episode")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)
    write_figure(figure, path)


def plot_policy(policy: Policy, layers: Sequence[ConvLayer], path: Path) -> None:
    """Write a PNG of a policy: a bar of weight bits up and one of activation bits down for each layer of a network,
    depthwise ones in another colour."""
    by_name = {layer.name: layer for layer in layers}
    depthwise = np.array([1 < by_name[name].groups == by_name[name].in_channels for name in policy.names])
    figure = Figure(figsize=(max(5.0, 1.5 + 0.16 * len(policy.names)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bits, at = policy.matrix(), np.arange(len(policy.names))
    for chosen, colour, label in ((~depthwise, "C0", "layers"), (depthwise, "C1", "depthwise layers")):
        if chosen.any():
            axes.bar(at[chosen], bits[chosen, 0], color=colour, label=label)
            if bits.shape[1] > 1:
                axes.bar(at[chosen], -bits[chosen, 1], color=colour, alpha=0.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("layer")
    axes.set_ylabel("activation bits, weight bits" if bits.shape[1] > 1 else "weight bits")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
