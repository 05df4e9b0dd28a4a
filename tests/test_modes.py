"""The modes of `search.py`: each has a parser of its own, and a mode from outside is one row of a table."""

from __future__ import annotations

import contextlib
import re
import sys

import pytest
from conftest import script

from apq.cli import run
from apq.errors import UserError
from methods import MODES, PREPARE, Mode

search = script("search")
PARSERS = {mode.name: mode.load().build_parser() for mode in (*MODES.values(), PREPARE)}
SHARED = {"--help", "--seed", "--device", "--json", "--overwrite"}
OUTSIDE = """
from methods import MODES, Mode
from methods.search.flags import mode_parser

MODES["nothing"] = Mode(name="nothing", module="outside", summary="finds nothing")

def build_parser():
    parser = mode_parser("nothing", "Find nothing.")
    parser.add_argument("--times", type=int, default=1)
    return parser

def run(args):
    print(args.times, args.exp_name)
"""


def flags_of(text):
    return set(re.findall(r"(?<![\w-])--\w+", text))


def shown(capsys, flags):
    with contextlib.suppress(SystemExit):
        search(flags)
    return capsys.readouterr().out


def test_help_shows_the_modes_and_no_flags_of_theirs(capsys):
    text = shown(capsys, ["--help"])
    lines = [line.strip() for line in text.splitlines()]
    for mode in (*MODES.values(), PREPARE):
        assert sum(line.endswith(mode.summary) for line in lines) == 1
    assert "--mode MODE --help" in text
    assert not {"--population", "--n_coarse", "--pick", "--lr_a"} & flags_of(text)


@pytest.mark.parametrize("mode", MODES)
def test_help_of_a_mode_shows_its_flags_and_no_others(mode, capsys):
    text = shown(capsys, ["--help", f"--mode={mode}"])
    assert text == PARSERS[mode].format_help()
    assert flags_of(text) >= SHARED
    others = {
        "--pick": {"nsga2"},
        "--n_coarse": {"coarse_to_fine"},
        "--image_bits": {"ddpg", "sensitivity"},
        "--loss_images": {"sensitivity"},
        "--prune_ratio": {"sequential"},
        "--parent_ratio": {"evolution", "sequential"},
        "--lr_a": {"ddpg", "sequential"},
        "--acc_train_sample": set(),
    }
    for flag, owners in others.items():
        assert (flag in flags_of(text)) == (mode in owners), flag


@pytest.mark.parametrize("words", [["--prepare", "acc", "-h"], ["--help", "--prepare=acc_quant"]])
def test_preparing_is_a_mode_of_its_own(words, capsys):
    text = shown(capsys, words)
    assert {"--acc_train_sample", "--netinfo"} <= flags_of(text)
    assert not {"--population", "--constraint"} & flags_of(text)


def test_an_abbreviation_or_a_wrong_mode_is_one_line(capsys):
    helps = r"\(see search.py --mode evolution --help, for other modes search.py --help\)"
    with pytest.raises(UserError, match=f"unrecognized arguments: --gener 3 {helps}"):
        search(["--constraint", "1", "--gener", "3"])
    with pytest.raises(UserError, match="invalid choice: 'genetic'"):
        search(["--mode", "genetic"])
    with pytest.raises(UserError, match="expected one argument"):
        search(["--mode"])
    assert capsys.readouterr() == ("", "")


def test_a_mode_from_outside(tmp_path, monkeypatch, capsys):
    (tmp_path / "outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside", raising=False)
    monkeypatch.setenv("APQ_PLUGINS", " outside ,")
    monkeypatch.setattr(sys, "argv", ["search.py", "--times", "3", "--mode", "nothing", "--exp_name", "a"])
    try:
        with pytest.raises(SystemExit) as end:
            run(search)
        assert (end.value.code, capsys.readouterr().out) == (0, "3 a\n")
        assert isinstance(MODES["nothing"], Mode)
        assert "finds nothing" in shown(capsys, ["--help"])
    finally:
        MODES.pop("nothing", None)


@pytest.mark.parametrize("text", [None, "import nowhere_at_all"])
def test_a_plugin_that_cannot_be_imported_is_one_line(text, tmp_path, monkeypatch, capsys):
    if text:
        (tmp_path / "no_plugin.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("APQ_PLUGINS", "no_plugin")
    with pytest.raises(SystemExit) as end:
        run(search, "search.py")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("search.py: APQ_PLUGINS: cannot import no_plugin: ModuleNotFoundError: No module")
