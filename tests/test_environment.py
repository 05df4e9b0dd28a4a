"""Whatever the caller has made of streams, variables and names: a result, or one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script
from example_results import write_found
from example_spaces import TINY
from PIL import Image

from apq.cli import Parser
from apq.errors import UserError
from apq.exits import DONE, FAULT, INTERRUPTED, MISTAKE, exit_code
from apq.files import cache_folder, read_json, write_json
from apq.genes import largest_subnet
from apq.space import space_to_dict
from dataset.imagenet import image_folder_space, image_folder_splits
from elastic_nn.training.distributed import processes
from lut.__main__ import main as lut

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def shell(line, folder, **variables):
    """Run a shell command in a folder. `$PYTHON` is Python with the modules of the checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    own = {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    return subprocess.run(
        ["/bin/sh", "-c", line], cwd=folder, env={**kept, **own, **variables}, capture_output=True, check=False
    )


SHOW, MISTAKEN, TABLE = (
    '"$PYTHON" -m apq digits',
    '"$PYTHON" -m apq digitz',
    '"$PYTHON" -m lut --space tiny.json --out t',
)


@pytest.fixture
def here(tmp_path):
    write_json(tmp_path / "tiny.json", space_to_dict(TINY))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"{SHOW} >&-", 0),
        (f"{SHOW} 2>&-", 0),
        (f"{SHOW} <&- >&- 2>&-", 0),
        (f"{SHOW} 2>/dev/full", 0),
        (f"{MISTAKEN} >&-", 2),
        (f"{MISTAKEN} 2>&-", 2),
        (f"{MISTAKEN} 2>/dev/full", 2),
        pytest.param(f"{SHOW} >/dev/full", 2, marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="none")),
    ],
)
def test_streams_that_are_closed_or_full(here, line, code):
    done = shell(line, here)
    assert done.returncode == code
    lines = done.stderr.decode().splitlines()
    assert len(lines) <= 1
    if ">/dev/full" in line and "2>" not in line:
        assert "No space left on device" in lines[0]


def test_a_closed_stdout_does_not_end_up_in_a_file(here):
    assert shell(TABLE, here).returncode == 0
    whole = (here / "t").read_bytes()
    (here / "t").unlink()
    assert shell(f"{TABLE} >&- 2>&-", here).returncode == 0
    assert (here / "t").read_bytes() == whole


def test_names_that_are_no_text(here):
    name = os.fsdecode(b"caf\xe9.json")  # latin-1
    os.rename(here / "tiny.json", here / name)  # noqa: PTH104
    for encoding in ("utf-8", "ascii", "latin-1"):
        found = shell('"$PYTHON" -m lut --model $(echo caf*.json):largest', here, PYTHONIOENCODING=encoding)
        assert (found.returncode, found.stderr) == (0, b"")
        absent = shell('"$PYTHON" -m apq "$(printf "no\\351.json")"', here, PYTHONIOENCODING=encoding)
        assert (absent.returncode, absent.stderr.count(b"\n")) == (2, 1)


def test_images_whose_names_are_no_text(tmp_path):
    for part in ("train", "val"):
        for name in (b"a", b"caf\xe9"):
            folder = tmp_path / part / os.fsdecode(name)
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32)).save(folder / os.fsdecode(b"\xff%d.png" % i))
    space = image_folder_space(TINY, tmp_path)
    assert len(image_folder_splits(space, tmp_path).source["files"]) == 64


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("APQ_CACHE")
    monkeypatch.setattr(Path, "home", nowhere)
    assert cache_folder().name == f"apq-cache-{os.getuid()}"


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT not: start the processes with torchrun"),
        ({"WORLD_SIZE": "", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "but there are"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "1", "RANK": "-1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "cannot be connected"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(monkeypatch, variables, match):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=match), processes(torch.device("cpu")):
        raise AssertionError


@pytest.mark.parametrize("words", ["-m apq --help", "test.py --exp_dir none", "search.py --constraint 1 --exp_name a"])
def test_half_of_torchruns_environment_is_told_by_all_scripts(tmp_path, words):
    words = words.replace("test.py", str(ROOT / "test.py")).replace("search.py", str(ROOT / "search.py"))
    for variables in ({"WORLD_SIZE": "2", "RANK": "1"}, {"WORLD_SIZE": "two"}):
        if "--help" not in words:
            done = shell(f'"$PYTHON" {words}', tmp_path, **variables)
            assert done.returncode == 2
            assert b"WORLD_SIZE" in done.stderr
    done = shell(f'"$PYTHON" {words}', tmp_path, RANK="1")  # set by other programs, and no sign of torchrun
    assert done.returncode == 0 if "--help" in words else (done.returncode == 2 and b"RANK" not in done.stderr)


def test_a_backend_of_matplotlib_that_does_not_exist(here):
    write_found(here / "found", TINY, largest_subnet(TINY))
    done = shell('"$PYTHON" -m report.analyse diagram found', here, MPLBACKEND="no such backend")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (here / "found/diagram.png").exists()


@pytest.mark.parametrize(
    "code",
    [
        # As between two imports of a script. Python has this handler unless a shell started it in its background.
        "import apq.cli, signal as s; s.signal(s.SIGINT, s.default_int_handler); s.raise_signal(s.SIGINT)",
        "import plugin",  # in a module that turns an interrupt into another error
    ],
)
def test_an_interrupt_during_imports_is_one_line(tmp_path, code):
    (tmp_path / "plugin.py").write_text(
        "from apq.cli import run\n"
        "def main(argv):\n"
        "    try:\n        raise KeyboardInterrupt\n"
        "    except KeyboardInterrupt:\n        raise ImportError('initialization failed')\n"
        "run(main)\n"
    )
    done = shell(f'"$PYTHON" -c "{code}"', tmp_path)
    assert done.returncode in (INTERRUPTED, -2, 128 + 2)
    assert done.stderr.decode().splitlines() == ["interrupted; the same command continues saved work"]


def raising(error):
    def main(argv):
        raise error

    return main


def test_a_fault_of_the_program_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert exit_code(raising(TypeError("two\nlines")), [], "tool") == FAULT
    (file,) = tmp_path.iterdir()
    line = capsys.readouterr().err
    assert line.startswith("tool: internal error: TypeError: two lines; please report it with ")
    assert line.count("\n") == 1
    assert str(file) in line
    assert "in raising" not in file.read_text()
    assert "raise error\nTypeError: two\nlines" in file.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert exit_code(raising(TypeError("again")), [], "tool") == FAULT
    assert "raise error\nTypeError: again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("wrong\nflag"), "tool: wrong flag"),
        (UserError("Traceback ...\napq.errors.UserError: no images"), "tool: no images"),
        (PermissionError(13, "Permission denied", "f"), "tool: f: Permission denied"),
        (OSError(5, "Input/output error"), "tool: Input/output error"),
        (OSError(36, "File name too long", b"\xff"), "tool: \\udcff: File name too long"),
        (MemoryError(), "tool: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore"), "tool: out of memory: Default"),
        (
            RuntimeError("f does not have a deterministic implementation, but"),
            "tool: --deterministic: f has no",
        ),
        (RuntimeError("unable to write: No space left on device (28)"), "tool: RuntimeError: unable to write"),
    ],
)
def test_what_the_system_refuses_is_one_line(capsys, error, line):
    assert exit_code(raising(error), [], "tool") == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_exit_codes(capsys):
    assert exit_code(lambda argv: None, [], "tool") == DONE
    assert exit_code(lambda argv: Parser("words").parse_args(argv), ["--help"], "tool") == DONE
    assert exit_code(raising(KeyboardInterrupt()), [], "tool") == INTERRUPTED


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (int, ["1" * 5000, "2.5", "²", "1e3", str(10**9 + 1), str(-(10**9) - 1), ""]),
        (float, ["nan", "inf", "-inf", "1e308", "x", "1" * 400, ""]),
        (Path, ["", "a\nb", "a\0b"]),
    ],
)
def test_values_that_no_flag_takes(kind, wrong):
    parser = Parser("words")
    parser.add_argument_group("group").add_argument("--flag", type=kind)
    for text in wrong:
        with pytest.raises(UserError, match=r"^argument --flag: .{1,200}$"):
            parser.parse_args(["--flag", text])
    right = {int: "-12", float: "-1e-5", Path: "a b"}[kind]
    assert parser.parse_args([f"--flag={right}"]).flag == kind(right)


@pytest.mark.parametrize(
    ("script_name", "flags"),
    [
        ("train", ["--seed", str(2**63)]),
        ("train", ["--seed", "9" * 5000]),
        ("train", ["--model", "mobilenet_v2_small", "--lr", "1e308"]),
        ("train", ["--batch_size", str(10**9)]),
        ("train", ["--out", ""]),
        ("quant_aware", ["--lr", "nan"]),
        ("quant_aware", ["--epochs", "0"]),
        ("quant_aware", ["--batch_size", "99999999999999999999"]),
        ("quant_aware", ["--exp_dir", ""]),
        ("test", ["--batch_size", str(2**21)]),
        ("search", ["--prepare", "acc", "--acc_train_sample", str(10**9)]),
        ("search", ["--prepare", "acc", "--seed", str(2**64)]),
        ("search", ["--constraint", "1", "--population", str(10**9)]),
        ("search", ["--constraint", "inf"]),
        ("search", ["--mode", "nsga2", "--population", str(10**9)]),
        ("search", ["--mode", "coarse_to_fine", "--n_coarse", str(10**9)]),
        ("search", ["--mode", "ddpg", "--model", "x", "--hidden", str(10**9)]),
    ],
)
def test_limits_of_flags(tmp_path, monkeypatch, script_name, flags):
    """Before any work: in an empty folder nothing else could be said of these flags."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^argument {flags[-2]}: "):
        script(script_name)(flags)
    assert not list(tmp_path.iterdir())


def test_a_resolution_has_a_limit():
    with pytest.raises(UserError, match=r"^argument --resolution: '100000' .* at most 8192"):
        lut(["--model", "resnet18", "--resolution", "100000"])


def test_what_is_no_plain_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="not a file"):
            write_json(path, [1])
    (tmp_path / "link").symlink_to(os.devnull)
    with pytest.raises(UserError, match="device"):
        write_json(tmp_path / "link", [1])
    write_json(tmp_path / "plain", [1])
    assert read_json(tmp_path / "plain") == [1]
