"""Command lines of all scripts: common flags, exit codes, plugins, printed tables."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from apq.errors import UserError
from apq.exits import Main, drop_output, exit_code, quiet_interrupts, steady_streams
from apq.names import shown
from apq.processes import first_process, quieten

quiet_interrupts()  # scripts import this module first, and slow ones after it

MOST = 10**9  # of a flag that counts something: more is a slip of the finger, and could overflow
LARGEST = 1e30  # of a flag that measures something: its square is still a float
LARGEST_SEED = 2**63 - 1  # torch and numpy take seeds of 64 bits
# Limits of flags that decide how much memory is taken at once. They are far above what a machine can do.
MOST_BATCH, MOST_SIDE, MOST_LR = 1 << 20, 1 << 13, 1e3
MOST_CANDIDATES, MOST_PAIRS, MOST_HIDDEN, MOST_MEMBERS = 10**5, 10**6, 1 << 13, 64
WHOLE = re.compile(r"[+-]?[0-9]{1,20}")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        complete = action.default is None or action.default is False or "(default" in (action.help or "")
        return action.help if complete else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that shows defaults in --help and raises UserError for a wrong command line.

    In every flag of `type` int, float or Path, numbers beyond MOST or LARGEST, NaN, and the empty path are mistakes.
    `options` go to ArgumentParser. Errors name `prog`, if it is given, as the command that prints the help.
    """

    def __init__(self, description: str, **options: Any) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False, **options)
        for kind, checked in ((int, at_least(-MOST)), (float, _finite), (Path, _path)):
            self.register("type", kind, checked)
        self.help_command = f"{options['prog']} --help" if "prog" in options else "--help"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.help_command})")


def at_least(lowest: int, most: int = MOST) -> Callable[[str], int]:
    """The `type` of a flag that takes whole numbers from `lowest` to `most`."""

    def number(text: str) -> int:
        wrong = f"{shown(text)} is not a whole number of at least {lowest}"
        if not WHOLE.fullmatch(text) or (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(wrong)
        if value > most:
            raise argparse.ArgumentTypeError(f"{wrong} and at most {most}")
        return value

    return number


def above_0(most: float) -> Callable[[str], float]:
    """The `type` of a flag that takes numbers above 0 and up to `most`. NaN is none."""

    def number(text: str) -> float:
        if not 0 < (value := _float(text)) <= most:
            raise argparse.ArgumentTypeError(f"must be positive and at most {most:g}, not {shown(text)}")
        return value

    return number


def _path(text: str) -> Path:
    if not text or any(ord(letter) < ord(" ") for letter in text):  # the empty path would be the current folder
        raise argparse.ArgumentTypeError(f"{shown(text)} is not the path of a file or folder")
    return Path(text)


def _finite(text: str) -> float:
    if not abs(value := _float(text)) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number up to {LARGEST:g}")
    return value


def _fraction(text: str) -> float:
    if not 0 < (value := _float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number between 0 and 1")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_common_flags(parser: argparse.ArgumentParser, *, seed: bool = True, device: bool = True) -> None:
    """Add --seed, --device and --json."""
    if seed:
        parser.add_argument("--seed", type=at_least(0, LARGEST_SEED), default=0, help="seed of all random numbers")
    if device:
        parser.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda"),
            default="auto",
            help="auto: what APQ_DEVICE says, or else a GPU if there is one",
        )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_execution_flags(parser: argparse.ArgumentParser) -> None:
    """Add --amp, --accumulate, --ema and --deterministic, for scripts that train."""
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument(
        "--accumulate", type=at_least(1, MOST_BATCH), default=1, help="parts that a batch is cut into, to save memory"
    )
    parser.add_argument(
        "--ema",
        type=_fraction,
        help="keep a moving average of the weights with this decay, e.g. 0.9998, and end with it",
    )
    add_deterministic_flag(parser)


def add_deterministic_flag(parser: argparse.ArgumentParser) -> None:
    """Add --deterministic, for all that trains."""
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="compute by deterministic algorithms, which are slower on a GPU: the same command gives the same bits "
        "there, also after a kill (on a CPU it always does)",
    )


def run(main: Main, name: str | None = None, *, alone: bool = False) -> NoReturn:
    """Run a script's main function and exit, see `exit_code`. The plugins are imported first, see `import_plugins`.

    Of several processes of torchrun the first alone runs it, if `alone` is set.
    """

    def with_plugins(argv: list[str] | None) -> None:
        if alone and not first_process():
            return
        import_plugins()
        main(argv)

    quieten()
    steady_streams()
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files, and matplotlib refuses the import for a name it lacks
    code = exit_code(with_plugins, None, name or Path(sys.argv[0]).name)
    if code:
        drop_output()
    sys.exit(code)


def import_plugins() -> None:
    """Import the modules named in APQ_PLUGINS, separated by commas. They add rows to the tables of the toolkit.

    UserError where one cannot be imported.
    """
    for name in filter(None, map(str.strip, os.environ.get("APQ_PLUGINS", "").split(","))):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a user's module raises
            raise UserError(f"APQ_PLUGINS: cannot import {name}: {type(error).__name__}: {error}") from error


def listing(facts: Mapping[str, object]) -> str:
    """Format names and values, one pair a line, with the values in a column."""
    width = max(18, *map(len, facts))
    return "\n".join(f"  {name:{width}} {value}" for name, value in facts.items())


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Format rows as text columns: the first aligned left, the others right."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
