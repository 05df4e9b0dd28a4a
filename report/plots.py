"""Figures of searches, fronts, policies and trainings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apq.errors import UserError
from apq.files import Record, atomic_open
from apq.layers import ConvLayer
from apq.policy import Policy

STYLES = ("-", "--", ":", "-.")
OURS = {"Description": "drawn by apq"}  # text in every picture, which tells it from those of others


def plot_history(
    records: Sequence[Record],
    path: Path,
    *,
    constraint: float | None = None,
    unit: str = "",
    quantity: str = "cost",
    title: str | None = None,
) -> None:
    """Write a PNG of an evolutionary search: best and mean predicted accuracy, and the cost of the best subnet.

    `records` are those of `EvolutionFinder`; `constraint` is the budget; `quantity` and `unit` label the cost.
    """
    figure = new_figure(7, 6)
    accuracy, cost = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    generations = range(len(records))  # a search in rounds has those of all rounds
    # A search of no generations has one record, which a line without markers would not show.
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
    """Write a PNG of top-1 accuracy (0 to 1): one line of (x, top-1) for each name.

    Names with the same part after the last comma share a colour, names with the same part before it a line style.
    """
    percent = {name: (x, 100 * np.asarray(top1)) for name, (x, top1) in lines.items()}
    _plot_lines(percent, path, xlabel=xlabel, ylabel="top-1 accuracy (%)", title=title)


def plot_losses(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, xlabel: str) -> None:
    """Write a PNG of training losses, with colours and styles as in `plot_top1`."""
    _plot_lines(lines, path, xlabel=xlabel, ylabel="training loss", title="")


def _plot_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, xlabel: str, ylabel: str, title: str
) -> None:
    figure = new_figure(7, 4.5)
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


def plot_episodes(records: Sequence[Record], path: Path, *, original: float) -> None:
    """Write a PNG of an agent's search: top-1 of each episode, the best so far, and the `original` one (0 to 1)."""
    figure = new_figure(7, 4)
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


def plot_sensitivities(records: Sequence[Record], path: Path) -> None:
    """Write a PNG of sensitivities: a panel an operand, in it the increase of the loss over the layers at each bits.

    `records` have "layer", "operand", "bits" and "increase". Increases below 0.0001, or below 0, are drawn there.
    """
    operands = list(dict.fromkeys(record["operand"] for record in records))
    layers = list(dict.fromkeys(record["layer"] for record in records))
    figure = new_figure(max(6, 0.3 * len(layers)), 1 + 3.2 * len(operands))
    panels = figure.subplots(len(operands), 1, sharex=True, squeeze=False)[:, 0]
    for axes, operand in zip(panels, operands, strict=True):
        own = [record for record in records if record["operand"] == operand]
        for i, bits in enumerate(sorted({record["bits"] for record in own})):
            points = [(layers.index(r["layer"]), max(r["increase"], 1e-4)) for r in own if r["bits"] == bits]
            axes.plot(*zip(*points, strict=True), ".-", color=f"C{i}", label=f"{bits} bits")
        axes.set_yscale("log")
        axes.set_ylabel(f"increase of the loss, {operand}")
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize="small")
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize="small")
    write_figure(figure, path)


def plot_policy(policy: Policy, layers: Sequence[ConvLayer], path: Path) -> None:
    """Write a PNG of a policy: for each layer a bar of weight bits up and one of activation bits down.

    Depthwise layers have their own colour.
    """
    by_name = {layer.name: layer for layer in layers}
    depthwise = np.array([1 < by_name[name].groups == by_name[name].in_channels for name in policy.names])
    figure = new_figure(max(5.0, 1.5 + 0.16 * len(policy.names)), 4)
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


def plot_front(
    flops: np.ndarray, top1: np.ndarray, n_coarse: int, coarse_front: np.ndarray, front: np.ndarray, path: Path
) -> None:
    """Write a PNG of measured subnets (n,) and both fronts (indices). The first `n_coarse` subnets are coarse."""
    figure = new_figure(7, 5)
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
    accuracy: np.ndarray,
    costs: Mapping[str, np.ndarray],
    units: Mapping[str, str],
    picked: int,
    path: Path,
    measured: np.ndarray,
) -> None:
    """Write a PNG of a front of predicted accuracies `(n,)`: one panel a cost, with the `picked` point marked.

    The colour of a point shows its first cost. `measured` accuracies `(n,)`, NaN where there are none, are drawn below
    or above their predictions.
    """
    known = ~np.isnan(measured)
    figure = new_figure(1 + 5.5 * len(costs), 5)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    (first, colours), *_ = costs.items()
    for axes, (name, cost) in zip(panels, costs.items(), strict=True):
        points = axes.scatter(cost, 100 * accuracy, s=9, c=colours)
        axes.plot(cost[picked], 100 * accuracy[picked], "o", markersize=10, markerfacecolor="none", color="C3")
        if known.any():
            ends = 100 * np.sort([accuracy[known], measured[known]], axis=0)
            axes.vlines(cost[known], *ends, color="black", linewidth=0.5)
            axes.plot(cost[known], 100 * measured[known], "x", markersize=6, color="black", label="measured")
            axes.legend(loc="lower right", frameon=False)
        axes.set_xlabel(f"{name} ({units[name]})")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 accuracy (%), predicted" + (" and measured" if known.any() else ""))
    if len(costs) > 1:
        figure.colorbar(points, ax=panels, label=f"{first} ({units[first]})")
    write_figure(figure, path)


def plot_depths(counts: Mapping[str, Sequence[int]], depths: Sequence[int], path: Path) -> None:
    """Write a PNG of the total depths of fronts: the fraction of subnets at each depth, one colour a front."""
    figure = new_figure(7, 4)
    _draw_depths(figure.subplots(), counts, depths)
    write_figure(figure, path)


def _draw_depths(axes: Axes, counts: Mapping[str, Sequence[int]], depths: Sequence[int]) -> None:
    width = 0.8 / len(counts)
    for i, (name, of_front) in enumerate(counts.items()):
        at = np.array(depths) + (i - (len(counts) - 1) / 2) * width
        axes.bar(at, np.array(of_front) / sum(of_front), width, color=f"C{i}", label=f"{name} ({sum(of_front)})")
    axes.set_xlabel("blocks")
    axes.set_ylabel("share of the front")
    axes.set_xticks(list(depths))
    axes.legend(loc="best", frameon=False)


def plot_drops(drops: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], path: Path) -> None:
    """Write a PNG of drops in top-1 (0 to 1): a panel a supernet, in it points (macs, drop) for each group."""
    figure = new_figure(1 + 5.5 * len(drops), 4.5)
    panels = figure.subplots(1, len(drops), squeeze=False)[0]
    for axes, (name, groups) in zip(panels, drops.items(), strict=True):
        for i, (group, (macs, drop)) in enumerate(groups.items()):
            axes.plot(macs / 1e6, 100 * drop, ".", markersize=3, color=f"C{i}", alpha=0.6, label=group)
        axes.set_xlabel("multiply-accumulates (M)")
        axes.set_title(f"from full precision to {name}")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", frameon=False)
    panels[0].set_ylabel("drop in top-1 accuracy (points)")
    write_figure(figure, path)


def plot_transfer(
    fronts: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    counts: Mapping[str, Sequence[int]],
    depths: Sequence[int],
    path: Path,
) -> None:
    """Write a PNG of fronts: a panel a supernet, in it (macs, top-1 there) of each front; a last panel of depths."""
    figure = new_figure(1 + 5 * (len(fronts) + 1), 4.5)
    *panels, last = figure.subplots(1, len(fronts) + 1)
    for axes, (judged_in, found) in zip(panels, fronts.items(), strict=True):
        for i, (found_in, (macs, top1)) in enumerate(found.items()):
            axes.step(macs / 1e6, 100 * top1, where="post", color=f"C{i}", linewidth=1.2, label=f"front of {found_in}")
        axes.set_xlabel("multiply-accumulates (M)")
        axes.set_ylabel("top-1 accuracy (%)")
        axes.set_title(f"in {judged_in}")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", frameon=False)
    _draw_depths(last, counts, depths)
    write_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, with sizes in inches. It needs no display and does not change pyplot's state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all: as an SVG if its name ends so, else as a PNG.

    An SVG has its text as text, and the same bytes each time.
    """
    with atomic_open(path, "wb") as file:
        if path.suffix != ".svg":
            figure.savefig(file, format="png", dpi=120, metadata=OURS)
            return
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "apq"}):
            figure.savefig(file, format="svg", metadata={**OURS, "Date": None})


def check_ours(path: Path) -> None:
    """UserError if a file exists that is not a picture of this program."""
    try:
        text = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if os.path.lexists(path) and not all(part.encode() in text for part in OURS.values()):
        raise UserError(f"{path} exists and is not a picture of this program: give another --out")
