"""Rooms and their promises. A module imports only from rooms on lower floors; the rules are the data below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from elastic_nn import quantizers

# A room imports itself and rooms of lower floors; rooms of one floor never import each other.
FLOOR = {"apq": 0, "dataset": 1, "lut": 1, "elastic_nn": 2, "export": 3, "report": 3, "utils": 3, "methods": 4}
# The scripts are floor 5: nothing imports them. (A module named "test" is also Python's own, "export" a room.)
SCRIPTS = ("search.py", "quant_aware.py", "test.py", "train.py", "export.py")
# Inside elastic_nn a sub-room imports itself and those before it.
STAIRS = ("quantizers", "modules", "networks", "training")
# A method imports itself and what methods share; `search` imports no method.
SHARED_BY_METHODS = "search"
# The vocabulary needs numpy and the standard library alone; these of its modules need torch.
VOCABULARY = {"apq", "numpy", *sys.stdlib_module_names}
LOADS_TORCH = {"checkpoint.py", "device.py", "skeleton.py"}
TORCH_IN_VOCABULARY = {*LOADS_TORCH, "resume.py"}  # this one where a state is read or written
# Unfinished work is kept by `Resume` and `Journal`. What was asked and where it is kept goes into them, not through
# signatures.
KEPT_BY_RESUME, RESUME = {"state_file", "asked", "restart"}, "apq/resume.py"
# A function fits a screen, and its call a few lines. A function that needs more is several, or takes a dataclass.
MOST_LINES, MOST_PARAMETERS = 60, 10  # parameters without self
# The kinds of quantizers and schemes are known in their own room, so that one from outside is not second-class. Others
# ask for facts. Only `quant_layers` finds quantizers by their base class.
QUANTIZERS, FINDS_QUANTIZERS = "elastic_nn/quantizers", "elastic_nn/modules/quant_layers.py"


def imports_of(file):
    """Dotted names of the modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(file):
    return {name.split(".")[0] for name in imports_of(file)}


def sub_rooms_of(file, room):
    """The sub-packages of a room that a file imports."""
    parts = [name.split(".") for name in imports_of(file)]
    names = {part[1] for part in parts if part[0] == room and len(part) > 1}
    return {name for name in names if (ROOT / room / name).is_dir()}


def files_of(room):
    return sorted((ROOT / room).rglob("*.py"))


def name_of(file):
    return str(file.relative_to(ROOT)) if hasattr(file, "relative_to") else str(file)


@pytest.mark.parametrize(("room", "file"), [(room, file) for room in FLOOR for file in files_of(room)], ids=name_of)
def test_imports_go_down(room, file):
    used = rooms_of(file)
    higher = {other for other in used & set(FLOOR) - {room} if FLOOR[other] >= FLOOR[room]}
    assert not higher, f"{name_of(file)} ({room}, floor {FLOOR[room]}) imports {higher}"
    assert not used & ({name.removesuffix(".py") for name in SCRIPTS} - {"test", "export"})


@pytest.mark.parametrize("file", files_of("elastic_nn"), ids=name_of)
def test_elastic_nn_has_stairs(file):
    own = file.relative_to(ROOT / "elastic_nn").parts[0]
    if own in STAIRS:
        higher = sub_rooms_of(file, "elastic_nn") - set(STAIRS[: STAIRS.index(own) + 1])
        assert not higher, f"{name_of(file)} imports {higher}"


@pytest.mark.parametrize("file", files_of("methods"), ids=name_of)
def test_methods_are_apart(file):
    others = sub_rooms_of(file, "methods") - {file.relative_to(ROOT / "methods").parts[0], SHARED_BY_METHODS}
    assert not others, f"{name_of(file)} imports {others}"


@pytest.mark.parametrize("file", files_of("apq"), ids=name_of)
def test_vocabulary_needs_numpy_alone(file):
    allowed = VOCABULARY | ({"torch"} if file.name in TORCH_IN_VOCABULARY else set())
    assert rooms_of(file) <= allowed


def test_every_room_is_on_a_floor():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "benchmarks"} == set(FLOOR)
    assert {p.parent.name for p in (ROOT / "elastic_nn").glob("*/__init__.py")} == set(STAIRS)
    assert {p.name for p in ROOT.glob("*.py")} == {*SCRIPTS, "setup.py"}


def test_the_vocabulary_alone_knows_which_blocks_run_and_how_wide_they_are():
    """Only `Subnet.running_slots`, `Subnet.mid_channels` and `SearchSpace.runs` compute it."""
    own_sum = re.compile(r"position(_of_slot)? <|round\([^)\n]*in_channels")
    files = [*(ROOT / room for room in FLOOR if room != "apq"), ROOT / "benchmarks"]
    sources = [file for folder in files for file in sorted(folder.rglob("*.py"))] + [ROOT / name for name in SCRIPTS]
    assert not [f"{file.relative_to(ROOT)}" for file in sources if own_sum.search(file.read_text())]


PRODUCT = [*(file for room in FLOOR for file in files_of(room)), *(ROOT / name for name in SCRIPTS)]
KINDS = {name for name in dir(quantizers) if name.endswith("Quantizer")} | {"PerBits"}
SCHEME_CONSTANTS = {name for name in dir(quantizers) if isinstance(getattr(quantizers, name), quantizers.QuantScheme)}


def functions_of(file):
    """The functions of a file, each with its parameters but self and cls."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = node.args
            several = [arg for arg in (own.vararg, own.kwarg) if arg]
            names = [arg.arg for arg in (*own.posonlyargs, *own.args, *own.kwonlyargs, *several)]
            yield node, [name for name in names if name not in ("self", "cls")]


def names_in(node):
    """Names and attributes in an expression."""
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return names | {part.attr for part in parts if isinstance(part, ast.Attribute)}


def test_one_place_chooses_the_device():
    """`apq.device` asks whether there is a GPU. Others are told the device, so that --device cpu means all of it."""
    asks = re.compile(r"cuda\.(is_available|device_count)\(")
    assert [name_of(file) for file in PRODUCT if asks.search(file.read_text())] == ["apq/device.py"]


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_functions_fit_a_screen(file):
    for function, parameters in functions_of(file):
        where = f"{name_of(file)}, {function.name}"
        assert function.end_lineno - function.lineno < MOST_LINES, where
        kernel = any("jit" in names_in(decorator) for decorator in function.decorator_list)  # can take no dataclass
        assert len(parameters) <= MOST_PARAMETERS or kernel, where


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_unfinished_work_is_kept_by_resume_alone(file):
    if name_of(file) != RESUME:
        assert not [f.name for f, parameters in functions_of(file) if KEPT_BY_RESUME & {*parameters}]


@pytest.mark.parametrize("file", [f for f in PRODUCT if not name_of(f).startswith(QUANTIZERS)], ids=name_of)
def test_quantizers_and_schemes_are_asked_for_facts(file):
    for node in ast.walk(ast.parse(file.read_text())):
        where = f"{name_of(file)}, line {getattr(node, 'lineno', 0)}"
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        assert called != "hasattr", where
        if called in ("isinstance", "issubclass"):
            own = {"Quantizer"} if name_of(file) == FINDS_QUANTIZERS else set()
            assert not names_in(node.args[1]) & KINDS - own, where
        if isinstance(node, ast.Compare):
            compared = [part for part in (node.left, *node.comparators) if isinstance(part, (ast.Name, ast.Attribute))]
            assert not {getattr(part, "id", getattr(part, "attr", "")) for part in compared} & SCHEME_CONSTANTS, where


def test_what_command_lines_need_is_light():
    """Neither --help nor a mistyped flag waits for torch."""
    vocabulary = [f"apq.{f.stem}" for f in (ROOT / "apq").glob("[!_]*.py") if f.name not in LOADS_TORCH]
    modules = ", ".join([*vocabulary, "dataset.table", "elastic_nn.training.recipes"])
    code = f"import sys, {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {*run.stdout.split()} & {"torch", "torchvision", "sklearn", "scipy", "matplotlib"}
