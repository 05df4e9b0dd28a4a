"""Names in flags and files: one plain part of a path, or one line that says why not."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apq.errors import UserError
from apq.experiment import get_experiment
from apq.names import plain_name
from apq.presets import DIGITS

BAD = ["", ".", "..", "a/b", "/", "../up", "a\\b", "a\nb", "a\0", "\x7f", "\udce9", " a", "a ", "x" * 256, "é" * 128]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match=r"^the name must be a plain name, not .{1,80}: [^\n]+$"):
        plain_name(name, "the name")
    with pytest.raises(UserError, match="a space's name"):
        replace(DIGITS, name=name)
    with pytest.raises(UserError, match=r"--exp_name.*--exp_dir"):
        get_experiment(name)


@pytest.mark.parametrize("name", [None, 1, ["a"], b"a"])
def test_a_name_is_text(name):
    with pytest.raises(UserError, match="not text"):
        plain_name(name, "the name")


@pytest.mark.parametrize("name", ["a", "digits-4bit", ".hidden", "...", "数字", "x" * 255, "é" * 127, "a b", "a:b"])
def test_plain_names_stay(name):
    assert plain_name(name, "the name") == name


@given(st.text(max_size=300))
def test_a_name_that_passes_is_one_part_of_a_path(name):
    with contextlib.suppress(UserError):
        name = plain_name(name, "the name")
        is_one_part(name)


def is_one_part(name):
    inside = Path("folder") / name
    assert inside.parent == Path("folder")
    assert inside.name == name
    assert len(name.encode()) <= 255
