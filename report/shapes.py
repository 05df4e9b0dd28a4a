"""Drop of shallow-fat and of deep-slim architectures from full precision to few bits (OQA, section 4.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from apq.files import Record
from apq.fronts import interval_of
from report.architectures import Architectures

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Number, mean and standard error of values. The mean of none and the error of fewer than two are None."""

    n: int
    mean: float | None
    stderr: float | None

    def __str__(self) -> str:
        mean = "-" if self.mean is None else f"{100 * self.mean:.2f}"
        return mean if self.stderr is None else f"{mean} +- {100 * self.stderr:.2f}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean difference of two groups, its standard error, and its interval at 95 % confidence."""

    mean: float
    stderr: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.2f} ({100 * self.low:+.2f} to {100 * self.high:+.2f})"


@dataclass(frozen=True, kw_only=True)
class DropRow:
    """The drops in one interval of MACs: of both groups, and shallow-fat less deep-slim (None: too few subnets)."""

    flops_from: float
    flops_to: float
    shallow_fat: Sample
    deep_slim: Sample
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Drops:
    """The drops in top-1 from the float supernet to another one.

    `rows` are of intervals of MACs, `whole` is of all subnets. `at_equal_flops` is the mean difference of the
    intervals, weighted by their numbers of subnets: the groups have other MACs on average. It is None if no interval
    has both.
    """

    rows: list[DropRow]
    whole: DropRow
    at_equal_flops: Difference | None


def drops_between(fat: Architectures, slim: Architectures, real: str, name: str, intervals: int) -> Drops:
    """Compare the drops of two groups from supernet `real` to supernet `name`."""
    drop = [group.top1[real] - group.top1[name] for group in (fat, slim)]
    flops = np.concatenate([fat.flops, slim.flops])
    edges = np.linspace(flops.min(), flops.max(), intervals + 1)
    at = [interval_of(group.flops, edges) for group in (fat, slim)]
    cells = [(drop[0][at[0] == i], drop[1][at[1] == i]) for i in range(intervals)]
    rows = [_row(low, high, *cell) for low, high, cell in zip(edges[:-1], edges[1:], cells, strict=True)]
    compared = [cell for cell in cells if min(map(len, cell)) >= 2]
    weights = np.array([len(a) + len(b) for a, b in compared], dtype=np.float64)
    return Drops(
        rows=rows,
        whole=_row(edges[0], edges[-1], *drop),
        at_equal_flops=difference_of(compared, weights / weights.sum()) if compared else None,
    )


def _row(low: float, high: float, fat: np.ndarray, slim: np.ndarray) -> DropRow:
    enough = min(len(fat), len(slim)) >= 2
    return DropRow(
        flops_from=float(low),
        flops_to=float(high),
        shallow_fat=sample_of(fat),
        deep_slim=sample_of(slim),
        difference=difference_of([(fat, slim)], np.ones(1)) if enough else None,
    )


def sample_of(values: np.ndarray) -> Sample:
    """Number, mean and standard error of values (n,)."""
    n = len(values)
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Sample(n=n, mean=float(values.mean()) if n else None, stderr=stderr)


def difference_of(cells: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> Difference:
    """Weighted mean over cells (weights sum to 1) of the difference of the means of two groups of two values or more.

    The variances of the groups need not be equal: the interval is Welch's, with Satterthwaite's degrees of freedom of
    the sum of all variances (Biometrics Bulletin 1946).
    """
    mean = sum(w * (a.mean() - b.mean()) for w, (a, b) in zip(weights, cells, strict=True))
    groups = [(w, group) for w, cell in zip(weights, cells, strict=True) for group in cell]
    variances = np.array([w**2 * group.var(ddof=1) / len(group) for w, group in groups])
    freedom = np.array([len(group) - 1 for _, group in groups])
    total, half = float(variances.sum()), 0.0
    if total > 0:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, total**2 / (variances**2 / freedom).sum())) * math.sqrt(total)
    return Difference(mean=float(mean), stderr=math.sqrt(total), low=float(mean) - half, high=float(mean) + half)


def table_of(drops: dict[str, Drops]) -> list[tuple[str, ...]]:
    """The drops as text: a row for each supernet and interval, in points."""
    rows = [("drop to", "MACs, M", "shallow-fat", "points", "deep-slim", "points", "difference (95 %)")]
    for name, found in drops.items():
        spans = [f"{row.flops_from / 1e6:.3f}-{row.flops_to / 1e6:.3f}" for row in found.rows]
        for span, row in zip([*spans, "all"], [*found.rows, found.whole], strict=True):
            groups = (str(row.shallow_fat.n), str(row.shallow_fat), str(row.deep_slim.n), str(row.deep_slim))
            rows.append((name, span, *groups, "-" if row.difference is None else str(row.difference)))
    return rows


def notes_of(drops: dict[str, Drops]) -> list[str]:
    """The difference at equal MACs for each supernet, in words."""
    notes = []
    for name, found in drops.items():
        equal = found.at_equal_flops
        told = "no interval has two subnets of both" if equal is None else f"{equal} points"
        notes.append(f"{name}: drop of shallow-fat less that of deep-slim, mean of the intervals: {told}")
    return notes


def facts_of(drops: dict[str, Drops]) -> Record:
    """The drops as plain data."""
    return {name: asdict(found) for name, found in drops.items()}
