"""Figures of fronts: what a search measured or predicted, and what its networks look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.fronts import ShapeRow
from utils.plots import write_figure


def plot_front(
    flops: np.ndarray, top1: np.ndarray, n_coarse: int, coarse_front: np.ndarray, front: np.ndarray, path: Path
) -> None:
    """Write a PNG of measured subnets, the first `n_coarse` in one colour, and of both fronts (indices)."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x, y = flops / 1e6, 100 * top1
    axes.plot(x[:n_coarse], y[:n_coarse], ".", markersize=4, color="C0", alpha=0.6, label="coarse")
    axes.plot(x[n_coarse:], y[n_coarse:], ".", markersize=4, color="C1", alpha=0.6, label="fine")
    axes.step(x[coarse_front], y[coarse_front], "--", where="post", color="C0", linewidth=1, label="coarse front")
    axes.step(x[front], y[front], where="post", color="C3", linewidth=1.2, label="front")
    axes.set_xlabel("multiply-accumulates (M)")
    axes.set_ylabel("top-1 accuracy without finetune (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    write_figure(figure, path)


def plot_predicted_front(
    accuracy: np.ndarray, costs: Mapping[str, np.ndarray], units: Mapping[str, str], picked: int, path: Path
) -> None:
    """Write a PNG of a front of predicted accuracies `(n,)`: against each cost a panel, with the `picked` point marked.

    With several costs the points of a panel are a cloud, since each is best in some way; colours tell the first cost.
    """
    figure = Figure(figsize=(1 + 5.5 * len(costs), 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    (first, colours), *_ = costs.items()
    for axes, (name, cost) in zip(panels, costs.items(), strict=True):
        points = axes.scatter(cost, 100 * accuracy, s=9, c=colours)
        axes.plot(cost[picked], 100 * accuracy[picked], "o", markersize=10, markerfacecolor="none", color="C3")
        axes.set_xlabel(f"{name} ({units[name]})")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("predicted top-1 accuracy (%)")
    if len(costs) > 1:
        figure.colorbar(points, ax=panels, label=f"{first} ({units[first]})")
    write_figure(figure, path)


def plot_depths(counts: Mapping[str, Sequence[int]], depths: Sequence[int], path: Path) -> None:
    """Write a PNG of the total depths of fronts: bars of the share of each front's subnets, a colour a front."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(counts)
    for i, (name, of_front) in enumerate(counts.items()):
        at = np.array(depths) + (i - (len(counts) - 1) / 2) * width
        axes.bar(at, np.array(of_front) / sum(of_front), width, color=f"C{i}", label=f"{name} ({sum(of_front)})")
    axes.set_xlabel("blocks")
    axes.set_ylabel("share of the front")
    axes.set_xticks(list(depths))
    axes.legend(loc="best", frameon=False)
    write_figure(figure, path)


def plot_shapes(rows: Mapping[str, Sequence[ShapeRow]], path: Path) -> None:
    """Write a PNG of the mean top-1 of shallow-fat and deep-slim subnets by FLOPs, a colour an experiment."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, of_experiment) in enumerate(rows.items()):
        x = [(row.flops_from + row.flops_to) / 2e6 for row in of_experiment]
        for key, style in (("shallow_fat", "o-"), ("deep_slim", "s--")):
            means = [getattr(row, key) for row in of_experiment]
            y = [np.nan if mean is None else 100 * mean for mean in means]
            axes.plot(x, y, style, color=f"C{i}", markersize=4, label=f"{name}: {key.replace('_', '-')}")
    axes.set_xlabel("multiply-accumulates (M)")
    axes.set_ylabel("mean top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)
    write_figure(figure, path)
