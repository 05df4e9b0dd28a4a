"""How a program ends: what it raises becomes one line on stderr and an exit code, here and nowhere else."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from apq.errors import UserError, one_line

DONE, FAULT, MISTAKE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: of a result, of a fault of the program, of what its user or the system can mend, of an interrupt."""
_SYSTEM = (errno.ENOMEM, errno.ENOSPC, errno.EMFILE)  # errors of the system that torch raises as RuntimeErrors
_OUT_OF_MEMORY = ("allocate memory", "out of memory", "not enough memory")  # words in torch's messages
_READER = "DataLoader worker (pid"  # of a worker that ended, which torch's messages begin with
_NOT_DETERMINISTIC = "does not have a deterministic implementation"  # of the operation that torch names before

Main = Callable[[list[str] | None], None]


def exit_code(main: Main, argv: list[str] | None, name: str) -> int:
    """Run a script's main function on `argv` and return the exit code. What it raises is told after the script's name.

    A UserError, and whatever the system refuses, is one line and MISTAKE. Any other exception is a fault of the program
    itself: one line that says so, and its traceback in a file.
    """
    try:
        main(argv)
        sys.stdout.flush()
    except SystemExit as error:  # argparse, after --help
        return error.code if isinstance(error.code, int) else DONE
    except KeyboardInterrupt:
        return _interrupt()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        drop_output()
        return FAULT
    except Exception as error:
        if _interrupted(error):
            return _interrupt()
        if (told := _mistake(error)) is not None:
            _tell(f"{name}: {told}")
            return MISTAKE
        _tell(f"{name}: {_fault(error)}")
        return FAULT
    return DONE


def steady_streams() -> None:
    """Make stdout and stderr usable whatever the caller has made of them.

    A closed one is the null device: a file that is opened later would get its number, and all output with it. Text that
    the terminal's encoding lacks is escaped. Stderr never raises: it has progress and warnings, and a full disk behind
    them must not end a training. Streams that are not the process's own, as tests make them, stay.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    if sys.stdout is sys.__stdout__:
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        encoding = sys.stderr.encoding if sys.stderr is not None else "utf-8"
        unfailing = io.BufferedWriter(_Unfailing(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(unfailing, encoding, errors="backslashreplace", line_buffering=True)


def drop_output() -> None:
    """Send what is still written to stdout nowhere, so that Python's own flush at the end does not fail again."""
    if sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Unfailing(io.FileIO):
    def write(self, data: bytes) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def quiet_interrupts() -> None:
    """Let an interrupt that nothing catches, while modules are imported, be one line instead of a traceback."""
    others = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _interrupt()
        else:
            others(kind, error, trace)

    sys.excepthook = hook


def _interrupt() -> int:
    _tell("interrupted; the same command continues saved work")
    return INTERRUPTED


def _interrupted(error: BaseException | None) -> bool:
    """Whether an exception came of an interrupt: one inside an import can end in an ImportError or SystemError."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _mistake(error: Exception) -> str | None:
    """What to tell of an exception that the user or the system has caused, None for one of the program itself."""
    if isinstance(error, UserError):
        # A loader's worker process puts its traceback in front.
        return " ".join(str(error).rsplit("UserError: ", 1)[-1].split())
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{one_line(error)}"
    said = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
    ):
        return f"out of memory: {said.splitlines()[0]}" if said else "out of memory"
    if isinstance(error, RuntimeError) and _READER in said:
        return "a process that reads images was killed (is memory short?); the same command continues"
    if isinstance(error, RuntimeError) and _NOT_DETERMINISTIC in said:
        return f"--deterministic: {said.split(_NOT_DETERMINISTIC)[0]}has no deterministic algorithm on this device"
    if isinstance(error, RuntimeError) and any(os.strerror(code) in said for code in _SYSTEM):
        return one_line(error)
    return None


def _fault(error: Exception) -> str:
    """One line about a fault of the program, with the file that its traceback was written to."""
    told = f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        handle, file = tempfile.mkstemp(prefix="apq-", suffix=".traceback")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(f"{sys.argv!r}\nPython {sys.version}\n\n{''.join(traceback.format_exception(error))}")
    except OSError:
        traceback.print_exception(error)
        return f"{told}; please report it with the traceback above, see CONTRIBUTING.md"
    return f"{told}; please report it with {Path(file)}, see CONTRIBUTING.md"


def _tell(line: str) -> None:
    # Names of files need not be text: bytes that are none are escaped.
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)
