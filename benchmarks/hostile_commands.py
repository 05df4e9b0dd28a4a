"""Command lines drawn from the parsers of all scripts: absurd and missing values, conflicts, paths of another kind."""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from apq.cli import Parser
from benchmarks.hostile_world import COMMANDS, main_of
from methods import MODES, PREPARE

ABSURD = (
    *(
        "",
        "0",
        "-1",
        "1",
        "2",
        "1.5",
        "1e308",
        "-1e308",
        "1e-320",
        "nan",
        "inf",
        "-inf",
        "1e999",
        str(10**9),
        str(2**63),
    ),
    *(
        str(2**64),
        "9" * 400,
        "9" * 5000,
        "²",
        "x",
        "None",
        "--",
        "-",
        "@",
        "[]",
        "{}",
        "a,b",
        ",",
        "latency<=",
        "latency<=nan",
    ),
    *(
        "accuracy",
        "accuracy,size",
        "8",
        "4x8",
        "33",
        "99999x1",
        "space.json",
        "few",
        "digits",
        "few:largest",
        "exps/found",
    ),
)
PATHS = (
    *("", ".", "..", "/", "~", "space.json", "chip.json", "table.json", "measured.csv", "genes.json", "strategy.json"),
    *(
        "models/few",
        "models/few/supernet.pt",
        "models/few/acc.pt",
        "exps/found",
        "exps/front",
        "exps/bits",
        "exps/coarse",
    ),
    *(
        "exps/found/arch",
        "exps/bits/policy.json#/strategy",
        "exps/bits/policy.json#/x/0",
        "images",
        "images/train",
        "cache",
    ),
    *(
        "pipe",
        "loop",
        "x" * 300,
        "a/" * 200,
        os.fsdecode(b"\xff\xe9"),
        "a\nb",
        "space.json/x",
        "/proc/self/mem",
        "/dev/null/x",
    ),
    *("/dev/zero", "exps/new", "models/new", "new.json", "new.png"),
)
NAMES = (
    "",
    ".",
    "..",
    "a/b",
    "../up",
    "x" * 300,
    "é" * 150,
    "\udce9",
    "a\nb",
    "new",
    "found",
    "front",
    "bits",
    "coarse",
    " ",
)


class Commands:
    """Draws command lines for the current folder, which it keeps a copy of."""

    def __init__(self) -> None:
        os.mkfifo("pipe")
        Path("loop").symlink_to("loop")
        self._copy, self._drawn = Path("../pristine").resolve(), 0
        shutil.copytree(".", self._copy, ignore=shutil.ignore_patterns("pipe", "loop"))
        self._mains = {script: main_of(script) for script in {words[0] for words in COMMANDS.values()}}
        self._parsers = self._find_parsers()

    def draw(self, rng: random.Random) -> tuple[list[str], Callable[[list[str]], None]]:
        """A command line, with the script first, and the main function that takes the rest."""
        script, *flags = rng.choice(list(COMMANDS.values()))
        words = [script, *(flags if rng.random() < 0.8 else flags[: rng.randrange(len(flags) + 1)])]
        actions = [action for action in self._parsers[self._key(words)]._actions if action.dest != "help"]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            action = rng.choice(actions)
            given = self._values(action, rng)
            if action.option_strings:
                flag = action.option_strings[-1]
                if flag in words[1:] and rng.random() < 0.7:
                    at = words.index(flag)
                    words[at + 1 : at + 2] = given
                else:
                    words += [flag, *given]
            else:
                words[rng.randrange(1, len(words) + 1) : len(words)] = given
        if rng.random() < 0.05:
            words.insert(rng.randrange(1, len(words) + 1), rng.choice(("--help", "--", "--no_such_flag", "-x", "")))
        return words, self._mains[script]

    def restore(self, *, every: int) -> None:
        """Put the folder back as it was, every so many command lines."""
        self._drawn += 1
        if self._drawn % every:
            return
        for item in Path().iterdir():
            if item.name not in ("pipe", "loop"):
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        shutil.copytree(self._copy, ".", dirs_exist_ok=True)

    @staticmethod
    def _values(action: argparse.Action, rng: random.Random) -> list[str]:
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            return []
        if rng.random() < 0.04:
            return []
        if action.choices and rng.random() < 0.8:
            return [str(rng.choice(list(action.choices)))]
        if action.type is Path:
            return [rng.choice(PATHS if rng.random() < 0.9 else ABSURD)]
        if action.type is None:
            return [rng.choice(rng.choice((NAMES, PATHS, ABSURD)))]
        return [rng.choice(ABSURD if rng.random() < 0.7 else ("1", "2", "3", "0.5"))]

    @staticmethod
    def _key(words: list[str]) -> str:
        if words[0] != "search.py":
            return words[0]
        if "--prepare" in words:
            return "prepare"
        return words[words.index("--mode") + 1] if "--mode" in words[:-1] else "evolution"

    def _find_parsers(self) -> dict[str, Parser]:
        found = {name: mode.load().build_parser() for name, mode in [*MODES.items(), ("prepare", PREPARE)]}
        for script, main in self._mains.items():
            build = main.__globals__.get("build_parser")
            found[script] = build() if build else _one_argument(script)
        return found


def _one_argument(script: str) -> Parser:
    """The parser of a module that builds it where it runs."""
    parser = Parser(script)
    parser.add_argument("source")
    parser.add_argument("--json", action="store_true")
    return parser
