"""The tables and the plot of a question, from its finished runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence_lines import Line, Question, budgets_of_lines, seeds_of
from benchmarks.evidence_statistics import paired
from benchmarks.markdown import markdown
from lut.costs import UNITS
from report.plots import new_figure, write_figure

Budget = tuple[str, float]
Values = dict[tuple[str, Budget, int], float]  # method, budget, seed -> a figure
ALL = "all"  # of the budgets of a quantity, or of all


def tables(question: Question, lines: Sequence[Line]) -> str:
    """Two Markdown tables: means and standard deviations of all figures, and paired tests of the first one."""
    shown = [means_row(question, lines, budget, method) for budget, method in cells(question, lines)]
    key, title, factor, decimals = question.figures[0]
    values = values_of(question, lines, key, factor)
    pairs, order = itertools.combinations(present(question, lines), 2), budgets_of_lines(lines)
    tests = [row for pair in pairs for row in tests_of(values, order, *pair)]
    n, failed = len(seeds_of(lines)), [line for line in lines if line.failed]
    parts = [
        f"{title}: mean ± standard deviation over {n} seeds",
        markdown(("budget", "method", "seeds", *(of for _, of, _, _ in question.figures)), shown),
    ]
    if tests:
        titles = ("first", "second", "budget", "seeds", "difference", "p, t test", "p, Wilcoxon", "least found")
        rows = [tuple(cell_of(value, decimals) for value in row) for row in tests]
        parts += [f"{title}, first minus second, paired by seed", markdown(titles, rows)]
    parts += [f"no result: {line.run.method}, {budget_text(budget_of(line))}, seed {line.run.seed}" for line in failed]
    return "\n\n".join(parts)


def budget_of(line: Line) -> Budget:
    return line.run.quantity, line.run.limit


def budget_text(budget: Budget) -> str:
    """A budget in words."""
    quantity, limit = budget
    return f"{limit:g} {UNITS[quantity]}" if quantity in UNITS else f"{limit:g} {quantity}"


def present(question: Question, lines: Sequence[Line]) -> list[str]:
    """The methods that have results."""
    return [method for method in question.methods if any(line.run.method == method for line in lines)]


def cells(question: Question, lines: Sequence[Line]) -> list[tuple[Budget, str]]:
    """Budgets and methods in the order of the table."""
    return list(itertools.product(budgets_of_lines(lines), present(question, lines)))


def means_row(question: Question, lines: Sequence[Line], budget: Budget, method: str) -> tuple[str, ...]:
    """A row of the first table."""
    own = [line for line in lines if line.run.method == method and budget_of(line) == budget and not line.failed]
    figures = []
    for key, _, factor, decimals in question.figures:
        values = [factor * line.figures[key] for line in own if line.figures.get(key) is not None]
        spread = f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
        figures.append(f"{np.mean(values):.{decimals}f}{spread}" if values else "")
    return budget_text(budget), method, str(len(own)), *figures


def values_of(question: Question, lines: Sequence[Line], key: str, factor: float) -> Values:
    """All values of a figure."""
    return {
        (line.run.method, budget_of(line), line.run.seed): factor * line.figures[key]
        for line in lines
        if not line.failed and line.figures.get(key) is not None
    }


def tests_of(values: Values, order: Sequence[Budget], first: str, second: str) -> list[tuple[object, ...]]:
    """Rows of the second table for two methods: each budget in `order`, and the seeds' means over all budgets.

    Seeds count that both methods have. For the means a seed needs every budget at which both methods have results.
    """
    common = {(b, s) for m, b, s in values if m == first} & {(b, s) for m, b, s in values if m == second}
    budgets = [budget for budget in order if any(at == budget for at, _ in common)]
    rows = []
    for budget in budgets:
        seeds = sorted(seed for at, seed in common if at == budget)
        rows.append((first, second, budget_text(budget), *test_of(values, first, second, [budget], seeds)))
    seeds = [s for s in sorted({s for _, s in common}) if all((b, s) in common for b in budgets)]
    if len(budgets) > 1 and seeds:
        rows.append((first, second, ALL, *test_of(values, first, second, budgets, seeds)))
    return rows


def test_of(
    values: Values, first: str, second: str, budgets: Sequence[Budget], seeds: Sequence[int]
) -> tuple[object, ...]:
    """Seeds, difference, both p and the least difference that the test finds, of means over the budgets."""
    means = [[np.mean([values[m, b, s] for b in budgets]) for s in seeds] for m in (first, second)]
    found = paired(*means)
    return found.n, (found.mean, found.std), Probability(found.t_test), Probability(found.wilcoxon), found.least


class Probability(float):
    """A p value, printed with two digits; NaN for none."""

    def __new__(cls, value: float | None) -> Probability:
        return super().__new__(cls, np.nan if value is None else value)


def cell_of(value: object, decimals: int) -> str:
    """A value as text."""
    if isinstance(value, Probability):
        return "" if np.isnan(value) else f"{value:.2g}"
    if isinstance(value, tuple):
        return f"{value[0]:+.{decimals}f} ± {value[1]:.{decimals}f}"
    return "" if value is None else f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def plot(question: Question, lines: Sequence[Line], path: Path) -> None:
    """Write an SVG: the first figure over the budgets, a panel a quantity, a line a method, bars of one deviation."""
    key, title, factor, _ = question.figures[0]
    values, budgets = values_of(question, lines, key, factor), budgets_of_lines(lines)
    quantities = list(dict.fromkeys(quantity for quantity, _ in budgets))
    figure = new_figure(1 + 4.5 * len(quantities), 3.6)
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        for i, method in enumerate(present(question, lines)):
            points = []
            for budget in (one for one in budgets if one[0] == quantity):
                own = [value for (m, b, _), value in values.items() if (m, b) == (method, budget)]
                if own:
                    points.append((budget[1], np.mean(own), np.std(own, ddof=1) if len(own) > 1 else 0.0))
            if points:
                x, y, spread = np.array(points).T
                shifted = x * (1 + 0.006 * (i - 1))  # so that bars do not hide each other
                axes.errorbar(shifted, y, spread, marker="o", markersize=4, capsize=2, color=f"C{i}", label=method)
        axes.set_xscale("log")
        limits = [limit for at, limit in budgets if at == quantity]
        axes.set_xticks(limits, [f"{limit:.3g}" for limit in limits])
        axes.minorticks_off()
        axes.set_xlabel(f"{quantity} ({UNITS[quantity]})" if quantity in UNITS else quantity)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(title if "top-1" not in title else f"{title} (%)")
    panels[0].legend(loc="best", frameon=False)
    write_figure(figure, path)
