"""Figures of fronts: what a coarse-to-fine search measured, and what its networks look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
