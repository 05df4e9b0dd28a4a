"""Export experiments in every form, check the files on test images, and print what they cost and how they agree.

The forms are written and checked by export.py, each in a process of its own. "Seconds" are those of freezing and
writing, without imports; "memory" is the peak of the process, with its imports and, in `check`, with all runtimes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apq.cli import Parser, run
from apq.exits import MISTAKE
from benchmarks.machine import describe
from benchmarks.markdown import markdown

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("onnx", "onnx-integer", "qonnx", "packed")
SLOW = {"qonnx": 1000}  # images, of forms whose runtime is slow


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--exp_dirs", type=Path, nargs="+", required=True, help="folders of experiments")
    parser.add_argument("--check", default="all", help="test images to check each file on, or all")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    results = {str(folder): {form: exported(folder, form, args.check) for form in FORMS} for folder in args.exp_dirs}
    if args.json:
        print(json.dumps(results))
        return
    print(describe(), "\n")
    titles = ("experiment", "form", "runtime", "images", "agree", "moved", "codes that differ", "top-1", "network's")
    print(markdown(titles, [row for name, of in results.items() for form in of.items() for row in checks(name, *form)]))
    titles = ("experiment", "form", "bytes", "claimed", "as published", "seconds", "memory, MB", "with check, MB")
    print("\n" + markdown(titles, [sizes(name, *form) for name, of in results.items() for form in of.items()]))


def exported(folder: Path, form: str, check: str) -> dict[str, Any]:
    """The result of export.py with and without the check; {"refused": why} where it cannot write the form."""
    images = str(SLOW[form]) if form in SLOW and (check == "all" or int(check) > SLOW[form]) else check
    bare, memory = _run(folder, form, "0")
    if "refused" in bare:
        return bare
    found, with_check = _run(folder, form, images)
    return {**found, "seconds": bare["seconds"], "memory": memory, "memory_with_check": with_check}


def _run(folder: Path, form: str, check: str) -> tuple[dict[str, Any], float]:
    """The result of a run of export.py, and its peak memory in MB."""
    command = [sys.executable, str(ROOT / "export.py"), "--exp_dir", str(folder), "--format", form, "--json"]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen([*command, "--check", check], stdout=said, stderr=complained)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        complained.seek(0)
        text, why = said.read(), complained.read().strip()
    memory = usage.ru_maxrss / 1024
    if process.returncode == MISTAKE:
        return {"refused": why.removeprefix("export.py: ")}, memory
    return json.loads(text)[form], memory


def checks(name: str, form: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the checks of one form; the last of them compares the network with itself in float64."""
    if "refused" in found:
        return [(name, form, found["refused"], *[""] * 6)]
    return [(name, form, *_check_row(check)) for check in found["checks"]]


def _check_row(check: dict[str, Any]) -> tuple[str, ...]:
    n, codes = check["n_images"], check["codes"]
    shares = (f"{100 * check[key] / n:.2f}" for key in ("agreed", "moved"))
    scores = (f"{100 * check[key] / n:.2f}" for key in ("right", "right_network"))
    return (check["name"], f"{n:,}", *shares, f"{check['other_codes']} of {codes:,}" if codes else "", *scores)


def sizes(name: str, form: str, found: dict[str, Any]) -> tuple[str, ...]:
    """A row of sizes, seconds and memory."""
    if "refused" in found:
        return (name, form, *[""] * 6)
    kinds = ("bytes", "claimed_bytes", "published_bytes")
    memory = (f"{found[key]:.0f}" for key in ("memory", "memory_with_check"))
    return (name, form, *(f"{found[kind]:,.0f}" for kind in kinds), f"{found['seconds']:.2f}", *memory)


if __name__ == "__main__":
    run(main)
