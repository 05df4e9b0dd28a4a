"""Markdown tables, for docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
