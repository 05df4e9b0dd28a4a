"""Damaged files and absurd command lines: a result or one line. The campaign is that of benchmarks/hostile.py."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks.hostile_guard import Outcome
from benchmarks.hostile_mutations import DEPTH, arrays, checkpoint, damaged, deflated, json_depth, json_value

FILES, COMMANDS = 2000, 300


def test_a_campaign_finds_nothing():
    """One process, so that what one case leaves behind could harm the next."""
    flags = ["--files", str(FILES), "--commands", str(COMMANDS), "--seed", "0", "--json"]
    command = [sys.executable, "-m", "benchmarks.hostile", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == {}
    assert found["cases"] == FILES + COMMANDS
    assert {*found["codes"]} <= {"0", "2", "None"}  # None: a command that was at work when its time was over
    assert min(found["codes"]["0"], found["codes"]["2"]) > FILES / 10  # neither all harmless nor all refused
    assert found["peak_mib"] <= 500
    assert done.returncode == 0


# The campaign itself: its guard sees what it is for, its damage is of the kinds that it names.

WATCHED = """
import json, os, sys, tempfile
from pathlib import Path
from benchmarks.hostile_guard import Guard

os.mkdir(sys.argv[1] + "/in")
os.chdir(sys.argv[1] + "/in")
tempfile.tempdir = os.getcwd()
guard = Guard(Path())
cases = {
    "inside": lambda argv: Path("a").write_text("x"),
    "above": lambda argv: Path("../a").write_text("x"),
    "beside": lambda argv: Path("../in-beside").mkdir(),
    "by a link": lambda argv: (os.symlink("..", "up"), Path("up/b").write_text("x")),
    "renamed": lambda argv: os.rename("a", "../c"),
    "raises": lambda argv: {}["x"],
    "memory": lambda argv: bytearray(os.urandom(1 << 20) * 600),
    "late": lambda argv: [0 for _ in iter(int, 1)],
    "mistake": lambda argv: open("absent"),
}
print(json.dumps({name: guard.run(main, [], name, 0.5).wrong(500) or "" for name, main in cases.items()}))
"""


def test_the_guard_sees_what_is_wrong(tmp_path):
    command = [sys.executable, "-c", WATCHED, str(tmp_path)]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert found["inside"] == found["mistake"] == ""
    for name in ("above", "beside", "by a link", "renamed"):
        assert found[name].startswith("writes "), name
    assert "KeyError: 'x'" in found["raises"]
    assert "MiB" in found["memory"]


def test_a_fault_counts():
    good = {"said": "", "seconds": 0.0, "peak_mib": 0.0, "outside": ()}
    assert Outcome(code=0, **good).wrong(1) is None
    assert Outcome(code=2, **{**good, "said": "tool: wrong\n"}).wrong(1) is None
    assert Outcome(code=2, **good).wrong(1) == "says nothing"
    assert Outcome(code=1, **good).wrong(1) == "exit code 1"
    assert Outcome(code=0, **{**good, "peak_mib": 2.0}).wrong(1) == "takes 2 MiB"
    assert Outcome(code=0, **{**good, "outside": ("open /x",)}).wrong(1) == "writes open /x"


@pytest.fixture
def samples():
    """Contents by suffix."""
    npz, pt = io.BytesIO(), io.BytesIO()
    np.savez(npz, a=np.arange(6), b=np.ones((2, 3)))
    torch.save({"state_dict": {"w": torch.ones(2, 3)}, "space": {"name": "x", "sizes": [1, 2]}}, pt)
    plain = {"name": "x", "sizes": [1, 2, {"a": 0.5}]}
    line = json.dumps(plain).encode()
    rows = b"layer,w_bits,a_bits,cost\n0,1,1,0.5\n"
    return {
        ".json": line,
        ".jsonl": line + b"\n" + line + b"\n",
        ".csv": rows,
        ".npz": npz.getvalue(),
        ".pt": pt.getvalue(),
        "": line,
        ".png": bytes(range(256)),
    }


def test_damage_is_seeded_and_varied(samples):
    for suffix, whole in samples.items():
        drawn = [damaged(whole, suffix, random.Random(i)) for i in range(200)]
        assert drawn == [damaged(whole, suffix, random.Random(i)) for i in range(200)]
        assert sum(content != whole for _, content in drawn) > 180, suffix
        assert len({name for name, _ in drawn}) >= 6, suffix


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_damage_of_values_leaves_files_that_can_be_opened(samples):
    for i in range(100):
        rng = random.Random(i)
        json.loads(json_value(samples[".json"], rng))
        assert len(json_depth(samples[".json"], rng)) in range(50, 8 * DEPTH)
        assert zipfile.ZipFile(io.BytesIO(arrays(samples[".npz"], rng))).testzip() is None
        torch.load(io.BytesIO(checkpoint(samples[".pt"], rng)), weights_only=True)
    parts = zipfile.ZipFile(io.BytesIO(deflated(samples[".pt"], random.Random(2)))).infolist()
    assert {part.compress_type for part in parts} == {zipfile.ZIP_DEFLATED}
