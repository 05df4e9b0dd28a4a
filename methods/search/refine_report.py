"""How far predictions were from measurements, printed beside the result of a search that measures."""

from __future__ import annotations

from dataclasses import replace

from apq.cli import table
from apq.files import Record
from apq.search_result import SearchResult
from report.search_report import Heading

REFINED = "refined"  # key of a search's settings: how far predictions were from measurements


def beside_refined(heading: Heading, result: SearchResult) -> Heading:
    """The heading with the rounds of the search, and the last one in bands of cost. Other searches have none."""
    if (found := result.settings.get(REFINED)) is None:
        return heading
    rows = [
        ("predicted before it was measured", result.unit, "subnets", "off on average", "mean |difference|"),
        *((f"round {i}", "", *_cells(one)) for i, one in enumerate(found["rounds"], start=1)),
        *(("the last one", f"{band['low']:.4g} to {band['high']:.4g}", *_cells(band)) for band in found["bands"]),
    ]
    return replace(heading, cautions=[*heading.cautions, table(rows)], facts={**heading.facts, REFINED: found})


def _cells(one: Record) -> tuple[str, str, str]:
    if not one["measured"]:
        return "0", "", ""
    off, distance = one["mean_difference"], one["mean_absolute_difference"]
    return str(one["measured"]), f"{100 * off:+.2f} points", f"{100 * distance:.2f} points"
