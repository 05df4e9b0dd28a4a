"""Unfinished work continues from its state, and never from that of other work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from apq.errors import UserError
from apq.resume import NOT_KEPT, Journal, Resume, difference

ASKED = {"seed": 0, "search": {"population": 9, "bits": (2, 4)}}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)
DTYPES = st.sampled_from(["bool", "int16", "int64", "uint8", "float32", "float64"])


@given(plain=PLAIN, array=DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_side=0))))
def test_a_state_comes_back_as_it_was(tmp_path_factory, plain, array):
    resume = Resume(tmp_path_factory.mktemp("state") / "a.state.pt", ASKED, "search")
    state = {
        "plain": plain,
        "array": array,
        "pair": (1, torch.arange(3.0)),
        "rng": np.random.default_rng(1).bit_generator.state,
    }
    resume.save(state)
    found = resume.load()
    assert found["plain"] == plain
    assert found["rng"] == state["rng"]  # its numbers have 128 bits
    assert found["array"].dtype == array.dtype
    np.testing.assert_array_equal(found["array"], array)
    assert found["pair"][0] == 1
    assert torch.equal(found["pair"][1], torch.arange(3.0))


def test_nothing_saved_is_nothing_to_continue_from(tmp_path):
    assert Resume(tmp_path / "a.state.pt", ASKED, "search").load() is None
    NOT_KEPT.save({"a": 1})
    NOT_KEPT.done()
    assert NOT_KEPT.load() is None
    assert not NOT_KEPT.due


def test_state_of_other_work_is_refused_by_name(tmp_path):
    file = tmp_path / "a.state.pt"
    Resume(file, ASKED, "search").save({"a": 1})
    other = {"seed": 1, "search": {"population": 9, "bits": [2, 8]}}
    with pytest.raises(UserError) as error:
        Resume(file, other, "search").load()
    assert str(error.value) == (
        f"{file} belongs to another search: search.bits was [2, 4], is [2, 8]; seed was 0, is 1; "
        "give --overwrite to start anew, or remove it"
    )
    assert Resume(file, other, "search", restart=True).load() is None
    assert Resume(file, ASKED, "search", restart=True).load() == {"a": 1}


def test_differences_are_told_by_their_path():
    assert difference({"a": (1, 2)}, {"a": [1, 2]}) == ""
    assert difference({"a": {"b": 1}}, {"a": {}}) == "a.b was given, is not"
    assert difference({}, {"a": 1}) == "a was not given, is given"
    assert difference({"weights": "0" * 64}, {"weights": "1" * 64}) == "weights changed"


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 torn"])
def test_a_damaged_state_is_refused_or_dropped(tmp_path, content):
    file = tmp_path / "a.state.pt"
    file.write_bytes(content)
    with pytest.raises(UserError, match="give --overwrite"):
        Resume(file, ASKED, "search").load()
    assert Resume(file, ASKED, "search", restart=True).load() is None


def test_what_a_kill_in_a_save_leaves_goes(tmp_path):
    resume = Resume(tmp_path / "a.state.pt", ASKED, "search")
    (tmp_path / ".a.state.pt.x1y2z3_4").write_text("half")
    kept = [".a.state.pt.bak", ".a.state.pt.original", ".b.state.pt.x1y2z3_4", "a.state.pt.x1y2z3_4"]  # of others
    for name in kept:
        (tmp_path / name).write_text("mine")
    resume.save({"a": 1})
    assert resume.load() == {"a": 1}
    resume.done()
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_one_of_several_processes_writes(tmp_path):
    file = tmp_path / "a.state.pt"
    Resume(file, ASKED, "search").save({"a": 1})
    second = Resume(file, ASKED, "search", writes=False)
    second.save({"a": 2})
    second.done()
    assert not second.due
    assert second.load() == {"a": 1}


def test_a_stage_has_a_file_of_its_own(tmp_path):
    whole = Resume(tmp_path / "all.state.pt", ASKED, "search", restart=True)
    stage = whole.stage("pruning", every_s=2.0)
    stage.save({"a": 1})
    assert stage.file == tmp_path / "pruning.state.pt"
    assert stage.every_s == 2.0
    assert whole.load() is None


def test_a_journal_keeps_the_records_of_all_processes(tmp_path):
    journals = [Journal(tmp_path / "meta.json", "pairs", "gathering", "remove it", rank) for rank in (0, 1)]
    assert not journals[0].holds(ASKED)
    journals[0].start(ASKED)
    for i, journal in enumerate(journals):
        journal.append({"index": i})
    assert journals[1].holds(ASKED)
    assert [record for _, _, record in journals[0].records()] == [{"index": 1}, {"index": 0}]
    with pytest.raises(UserError, match="belongs to another gathering: seed was 0, is 5; remove it"):
        journals[0].holds({**ASKED, "seed": 5})


def test_records_without_their_settings_are_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(UserError, match=r"has no meta\.json beside it"):
        Journal(tmp_path / "meta.json", "pairs", "gathering", "remove it").holds(ASKED)


def test_another_part_of_the_work_is_dropped(tmp_path):
    """Rounds have one file: the state of another round is no state of this one, and no error."""
    whole = Resume(tmp_path / "refine.state.pt", ASKED, "search")
    first, second = (whole.other("search", {"round": number}) for number in (0, 1))
    first.save({"a": 1})
    assert first.file == tmp_path / "search.state.pt"
    assert first.load() == {"a": 1}
    assert second.load() is None
    assert whole.load() is None
    assert NOT_KEPT.other("search", {"round": 0}).file is None


def test_records_of_an_earlier_version_are_those_of_the_same_work(tmp_path):
    journal = Journal(tmp_path / "meta.json", "pairs", "gathering", "remove it")
    journal.start({"seed": 0})
    assert journal.holds({"seed": 0, "nesterov": True}, lambda found: {"nesterov": True, **found})
    with pytest.raises(UserError, match="nesterov was true, is false"):
        journal.holds({"seed": 0, "nesterov": False}, lambda found: {"nesterov": True, **found})
    with pytest.raises(UserError, match="nesterov was not given, is given"):
        journal.holds({"seed": 0, "nesterov": True})
