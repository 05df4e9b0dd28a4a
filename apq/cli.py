"""Command lines of all scripts: common flags, exit codes, plugins, printed tables."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from apq.errors import UserError
from apq.processes import first_process, quieten


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        complete = action.default in (None, False) or "(default" in (action.help or "")
        return action.help if complete else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that shows defaults in --help and raises UserError for a wrong command line.

    `options` go to ArgumentParser. Errors name `prog`, if it is given, as the command that prints the help.
    """

    def __init__(self, description: str, **options: Any) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False, **options)
        self.help_command = f"{options['prog']} --help" if "prog" in options else "--help"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.help_command})")


def at_least(lowest: int) -> Callable[[str], int]:
    """The `type` of a flag that takes whole numbers of at least `lowest`."""

    def number(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return int(text)

    return number


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def add_common_flags(parser: argparse.ArgumentParser, *, seed: bool = True, device: bool = True) -> None:
    """Add --seed, --device and --json."""
    if seed:
        parser.add_argument("--seed", type=at_least(0), default=0, help="seed of all random numbers")
    if device:
        parser.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one"
        )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_execution_flags(parser: argparse.ArgumentParser) -> None:
    """Add --amp, --accumulate and --ema, for scripts that train."""
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument(
        "--accumulate", type=at_least(1), default=1, help="parts that a batch is cut into, to save memory"
    )
    parser.add_argument(
        "--ema",
        type=_fraction,
        help="keep a moving average of the weights with this decay, e.g. 0.9998, and end with it",
    )


def run(main: Callable[[list[str] | None], None], name: str | None = None, *, alone: bool = False) -> NoReturn:
    """Run a script's main function and exit. Of several processes of torchrun the first runs it, if `alone` is set.

    A UserError is printed as one line on stderr, after the script's name, with exit code 2. The plugins are imported
    first, see `import_plugins`.
    """
    if alone and not first_process():
        sys.exit(0)
    quieten()
    try:
        import_plugins()
        main(None)
        sys.stdout.flush()
    except UserError as error:
        message = str(error).rsplit("UserError: ", 1)[-1]  # a loader's worker process puts a traceback in front
        print(f"{name or Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"{name or Path(sys.argv[0]).name}: out of memory: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command continues saved work", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


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
