"""Time `--help` and the error for a mistyped flag, for every script and every `python -m` command.

Times are also printed as a multiple of `import torch`: a script that imports torch before it parses its flags has a
multiple of at least 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apq.cli import table
from methods import MODES

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "scipy", "sklearn", "matplotlib", "pymoo")
MISTYPED = "--no_such_flag"
SCRIPTS: dict[str, list[str]] = {
    "search.py": ["search.py"],
    **{f"search.py --mode {name}": ["search.py", "--mode", name] for name in MODES},
    "search.py --prepare acc": ["search.py", "--prepare", "acc"],
    "test.py": ["test.py"],
    "train.py": ["train.py"],
    "quant_aware.py": ["quant_aware.py"],
    "export.py": ["export.py"],
    **{
        f"python -m {name}": ["-m", name]
        for name in ("apq", "lut", "dataset.subset", "elastic_nn.convert", "report.analyse", "utils.qfa")
    },
}
# Runs a command line as Python does, then says which modules it imported.
PROBE = """
import runpy, sys
words = sys.argv[1:]
try:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
finally:
    print("\\n" + " ".join(sys.modules), file=sys.stderr)
"""


def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in the root of the checkout."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def imports_of(words: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Which of these modules a command line imports."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    imported = set(done.stderr.splitlines()[-1].split())
    return [name for name in modules if name in imported]


def median_seconds(words: Sequence[str], repeats: int) -> float:
    """Median wall-clock time of a command line."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run(words)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command line; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    python, torch = (median_seconds(["-c", code], args.repeats) for code in ("pass", "import torch"))
    scripts = {}
    for name, words in SCRIPTS.items():
        scripts[name] = {
            "help_seconds": median_seconds([*words, "--help"], args.repeats),
            "mistyped_seconds": median_seconds([*words, MISTYPED], args.repeats),
            "imports": imports_of([*words, "--help"], HEAVY),
        }
        scripts[name]["of_import_torch"] = scripts[name]["help_seconds"] / torch
    from benchmarks.machine import describe  # imports torch itself

    machine = describe()
    if args.json:
        print(json.dumps({"python": python, "import_torch": torch, "scripts": scripts, "machine": machine}))
        return
    print(table((key, str(value)) for key, value in machine.items()))
    print(f"python alone {python:.3f} s, import torch {torch:.3f} s\n")
    titles = ("command", "--help, s", "mistyped, s", "of import torch", "imports")
    print(
        table(
            [
                titles,
                *(
                    (
                        name,
                        f"{row['help_seconds']:.3f}",
                        f"{row['mistyped_seconds']:.3f}",
                        f"{row['of_import_torch']:.2f}",
                        " ".join(row["imports"]) or "-",
                    )
                    for name, row in scripts.items()
                ),
            ]
        )
    )


if __name__ == "__main__":
    main()
