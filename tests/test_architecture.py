"""The house has floors: a module imports only from rooms below its own."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FLOOR = {"apq": 0, "dataset": 1, "lut": 1, "utils": 2, "elastic_nn": 2, "methods": 3}
SCRIPTS = ("search.py", "quant_aware.py", "test.py", "train.py")
TORCH_AT_FLOOR_0 = {"checkpoint.py", "device.py"}  # the rest of the vocabulary needs numpy alone


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module.split(".")[0]


def modules():
    return [(room, file) for room in FLOOR for file in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize(("room", "file"), modules(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_imports_go_down(room, file):
    used = set(imports_of(file)) & set(FLOOR)
    higher = {other for other in used - {room} if FLOOR[other] >= FLOOR[room]}
    assert not higher, f"{file.relative_to(ROOT)} ({room}, floor {FLOOR[room]}) imports {higher}"
    scripts = {name.removesuffix(".py") for name in SCRIPTS} - {"test"}
    assert not set(imports_of(file)) & scripts


@pytest.mark.parametrize("file", sorted((ROOT / "apq").glob("*.py")), ids=lambda f: f.stem)
def test_vocabulary_needs_numpy_alone(file):
    allowed = {"apq", "numpy", *sys.stdlib_module_names} | ({"torch"} if file.name in TORCH_AT_FLOOR_0 else set())
    assert set(imports_of(file)) <= allowed


def test_every_room_is_on_a_floor():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "benchmarks"} == set(FLOOR)


def test_modules_stay_readable():
    long = {f.name: n for _, f in modules() if (n := len(f.read_text().splitlines())) > 300}
    assert not long


def test_the_vocabulary_alone_knows_which_blocks_run_and_how_wide_they_are():
    """`Subnet.running_slots`, `Subnet.mid_channels` and `SearchSpace.runs` say it."""
    own_sum = re.compile(r"position(_of_slot)? <|round\([^)\n]*in_channels")
    files = [*(ROOT / room for room in FLOOR if room != "apq"), ROOT / "benchmarks"]
    sources = [file for folder in files for file in sorted(folder.rglob("*.py"))] + [ROOT / name for name in SCRIPTS]
    assert not [f"{file.relative_to(ROOT)}" for file in sources if own_sum.search(file.read_text())]


def test_what_command_lines_need_is_light():
    """Neither --help nor a mistyped flag waits for torch."""
    vocabulary = [f"apq.{f.stem}" for f in (ROOT / "apq").glob("[!_]*.py") if f.name not in TORCH_AT_FLOOR_0]
    modules = ", ".join([*vocabulary, "dataset.table", "elastic_nn.training.recipes"])
    code = f"import sys, {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {*run.stdout.split()} & {"torch", "torchvision", "sklearn", "scipy", "matplotlib"}
