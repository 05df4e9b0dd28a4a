"""Draw the plots of docs/results.md from its tables, into docs/figures.

In a section, the first table whose cells are "mean ± standard deviation" is drawn: its rows along the x axis, a series
for each column but those of differences. `<!-- y: TEXT -->` before the picture labels the y axis. Numbers in the first
column are drawn at their place on a logarithmic axis, words side by side.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from apq.cli import Parser, run
from apq.errors import UserError
from report.plots import new_figure, write_figure

ROOT = Path(__file__).resolve().parent.parent
CELL = re.compile(r"([-+]?[\d.]+) ± ([\d.]+)")
PICTURE = re.compile(r"<!-- y: (?P<label>.+?) -->\n!\[[^\]]*\]\((?P<file>[^)]+)\)")
DIFFERENCES = ("gain", "difference")  # how columns begin that are not drawn


@dataclass(frozen=True, kw_only=True)
class Table:
    """The figures of a section: what x is, the rows, and for each series (rows, 2) means and deviations."""

    x: str
    rows: tuple[str, ...]
    series: dict[str, np.ndarray]
    label: str
    file: str


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md", help="the page")
    return parser


def main(argv: list[str] | None = None) -> None:
    page = build_parser().parse_args(argv).results
    for one in tables_of(page.read_text()):
        draw(one, page.parent / one.file)
        print(page.parent / one.file)


def tables_of(text: str) -> list[Table]:
    """The tables that are drawn. UserError for a picture without one."""
    found = []
    for section in re.split(r"(?m)^## ", text)[1:]:
        if (picture := PICTURE.search(section)) is not None:
            found.append(table_of(section, picture["label"], picture["file"]))
    return found


def table_of(section: str, label: str, file: str) -> Table:
    """The first table of a section with means and deviations."""
    for block in re.findall(r"(?m)(?:^\|.*\n)+", section):
        titles, _, *lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        if not any(CELL.fullmatch(cell) for cell in lines[0]):
            continue
        series = {}
        for column in range(1, len(titles)):
            cells = [CELL.fullmatch(line[column]) for line in lines]
            if any(cells) and not titles[column].startswith(DIFFERENCES):
                series[titles[column]] = np.array(
                    [[float(g) for g in c.groups()] if c else [np.nan] * 2 for c in cells]
                )
        rows = tuple(line[0].strip("`") for line in lines)
        return Table(x=titles[0], rows=rows, series=series, label=label, file=file)
    raise UserError(f"the section of {file} has no table of means and deviations")


def draw(table: Table, path: Path) -> None:
    """Write an SVG: a series a colour, bars of one standard deviation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    numbers = [number_of(row) for row in table.rows]
    on_scale = all(number is not None for number in numbers) and len(set(numbers)) == len(numbers)
    x = np.array(numbers, dtype=float) if on_scale else np.arange(len(table.rows), dtype=float)
    for i, (name, values) in enumerate(table.series.items()):
        aside = (i - (len(table.series) - 1) / 2) * 0.08
        place = x * np.exp(aside / 8) if on_scale else x + aside
        style = {"marker": "o", "markersize": 4, "capsize": 2, "color": f"C{i}", "label": name}
        axes.errorbar(place, values[:, 0], values[:, 1], linestyle="-" if on_scale else "none", **style)
    if on_scale:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(x, table.rows)
    axes.set_xlabel(table.x)
    axes.set_ylabel(table.label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    write_figure(figure, path)


def number_of(text: str) -> float | None:
    """The number that a row begins with, None for words."""
    found = re.fullmatch(r"(?:<= )?([\d.,]+)( .*)?", text)
    return float(found[1].replace(",", "")) if found else None


if __name__ == "__main__":
    run(main)
