"""One case after another in one process: how each ends, how long it takes, how much memory, what it writes where."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from apq.exits import FAULT, exit_code

WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
HARMLESS = ("/dev/null/", "/dev/shm/", f"/proc/{os.getpid()}/")  # no files of a disk
MOST_ADDRESSES = 16 << 30  # bytes of address space: far above what the cases may use, and below what would hurt


class Late(BaseException):
    """A case has had its time."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended: exit code, None where its time was over; the lines on stderr; seconds; MiB above the start."""

    code: int | None
    said: str
    seconds: float
    peak_mib: float
    outside: tuple[str, ...]
    trace: str = ""

    def wrong(self, most_mib: float) -> str | None:
        """What is wrong with it, None if nothing is."""
        if self.outside:
            return f"writes {', '.join(self.outside[:3])}"
        if self.code not in (0, 2, None):
            return self.trace or f"exit code {self.code}"
        if self.peak_mib > most_mib:
            return f"takes {self.peak_mib:.0f} MiB"
        if self.code == 2 and len(self.said.strip().splitlines()[-1:]) != 1:
            return "says nothing"
        return None


class Guard:
    """Runs cases inside one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())
        self._watching, self._outside = False, []
        resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGALRM, self._late)

    def run(self, main: Callable[[list[str]], object], argv: list[str], name: str, most_s: float) -> Outcome:
        """Run one case."""
        self._outside, before = [], _peak_mib(reset=True)
        out, err, code, trace = io.StringIO(), io.StringIO(), None, ""
        started = time.perf_counter()

        def kept(words: list[str]) -> None:
            nonlocal trace
            try:
                main(words)
            except Exception:
                trace = traceback.format_exc()
                raise

        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), self._watch():
            try:
                signal.setitimer(signal.ITIMER_REAL, most_s)
                code = exit_code(kept, argv, name)
            except Late:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.perf_counter() - started
        return Outcome(
            code=code,
            said=err.getvalue(),
            seconds=seconds,
            peak_mib=_peak_mib() - before,
            outside=tuple(self._outside),
            trace=trace if code == FAULT else "",
        )

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def _audit(self, event: str, args: tuple[object, ...]) -> None:
        if not self._watching or not (event in WRITING or event == "open"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(path, (str, bytes)):
                # The folder that the name is in counts, not where a link at the name leads.
                named = Path(os.fsdecode(path))
                full = str(named.parent.resolve() / named.name)
                if not f"{full}/".startswith((f"{self.folder}/", *HARMLESS)):
                    self._outside.append(f"{event} {full}")

    @staticmethod
    def _late(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            # Torch's writer of archives ends the process if an exception closes its file: wait until it is done.
            if frame.f_code.co_name == "save_checkpoint":
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                return
            frame = frame.f_back
        raise Late


def _peak_mib(*, reset: bool = False) -> float:
    """MiB of the largest resident size so far, or with `reset` from now on."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
