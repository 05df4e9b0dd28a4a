"""Scripts answer --help before they import slow libraries. benchmarks/startup.py measures the times."""

from __future__ import annotations

import pytest

from benchmarks.startup import HEAVY, MISTYPED, ROOT, SCRIPTS, imports_of, run

DOORS = [pytest.param(words, id=name) for name, words in SCRIPTS.items()]


@pytest.mark.parametrize("words", DOORS)
@pytest.mark.parametrize("flag", ["--help", MISTYPED])
def test_a_front_door_imports_nothing_heavy(words, flag):
    assert imports_of([*words, flag], HEAVY) == []


def test_help_and_mistakes_are_answered():
    commands = (["test.py", "--help"], ["test.py", MISTYPED], ["-m", "utils.analyse"])
    helped, wrong, renamed = (run(words) for words in commands)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--exp_dir" in helped.stdout
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"test.py: unrecognized arguments: {MISTYPED} (see --help)\n"
    assert renamed.returncode == 2
    assert renamed.stderr.startswith("python -m report.analyse: ")


def test_a_search_imports_what_it_uses(tmp_path):
    """scikit-learn, torchvision and torch._dynamo would add 300 MiB to a search, which needs none of them."""
    few = ["--population", "10", "--generations", "1", "--exp_dir", str(tmp_path / "found"), "--json"]
    words = ["search.py", "--constraint", "1", "--acc_predictor_dir", str(ROOT / "models" / "digits"), *few]
    assert imports_of(words, ("torch", "torchvision", "sklearn", "scipy", "pymoo", "torch._dynamo")) == ["torch"]
