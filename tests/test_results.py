"""docs/results.md: every question has an answer, a command, a table and a plot, and plots are drawn from the tables."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import ROOT

from apq.errors import UserError
from benchmarks.draw_results import draw, number_of, table_of, tables_of

PAGE = (ROOT / "docs" / "results.md").read_text()
SECTIONS = re.split(r"(?m)^## ", PAGE)[1:]

EXAMPLE = """Do they?

| budget, ms | ours | theirs | difference |
| --- | --- | --- | --- |
| 0.5 | 91.94 ± 0.67 | 88.90 ± 0.12 | 3.04 ± 0.56 |
| 2 | 92.96 ± 0.32 |  | 2.68 ± 0.34 |

<!-- y: top-1, % -->
![both](figures/both.svg)
"""


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_every_question_is_answered_with_a_command_a_table_and_a_plot(section):
    title, answer = section.split("\n\n", 2)[:2]
    assert title.endswith("?")
    assert answer.endswith(".")
    assert not answer.startswith(("|", "`"))
    assert re.search(r"`(python|search\.py|train\.py|[A-Z_]+=)", section.replace("\n", " "))
    (table,) = tables_of(f"## {section}")
    assert all(values.shape == (len(table.rows), 2) for values in table.series.values())
    assert (ROOT / "docs" / table.file).exists()


def test_the_list_of_answers_has_all_questions_and_its_links_lead_to_them():
    titles = [section.splitlines()[0] for section in SECTIONS]
    links = re.findall(r"(?m)^\| \[(.+?)\]\(#(.+?)\) \|", PAGE)
    assert [title for title, _ in links] == titles
    assert [anchor for _, anchor in links] == [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


def test_tables_are_read_as_written_and_columns_of_differences_are_not_drawn():
    (table,) = tables_of(f"# Page\n\n## {EXAMPLE}")
    assert (table.x, table.rows, table.label, table.file) == (
        "budget, ms",
        ("0.5", "2"),
        "top-1, %",
        "figures/both.svg",
    )
    assert list(table.series) == ["ours", "theirs"]
    np.testing.assert_array_equal(table.series["ours"], [[91.94, 0.67], [92.96, 0.32]])
    np.testing.assert_array_equal(table.series["theirs"], [[88.90, 0.12], [np.nan, np.nan]])


def test_a_picture_has_its_values_at_their_places(tmp_path):
    (table,) = tables_of(f"## {EXAMPLE}")
    draw(table, tmp_path / "one.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert all(text in drawn for text in ("budget, ms", "top-1, %", "ours", "theirs", ">0.5<", ">2<"))
    assert "difference" not in drawn
    draw(table, tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_text() == drawn


def test_a_picture_without_a_table_is_a_mistake():
    with pytest.raises(UserError, match=r"figures/both.svg has no table"):
        table_of("no table\n", "y", "figures/both.svg")


@pytest.mark.parametrize(
    ("text", "number"), [("0.0236", 0.0236), ("<= 0.5", 0.5), ("4 bits", 4), ("1,000", 1000), ("k-means", None)]
)
def test_numbers_of_rows(text, number):
    assert number_of(text) == number
