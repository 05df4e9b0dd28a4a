"""Progress of long work: a bar on a terminal; in a log a line now and then, and one at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from tqdm import tqdm

LOG_SECONDS = 60.0  # between lines of a log
WORTH_A_LINE = 1.0  # seconds: shorter work leaves no line


class Progress:
    """Counts the steps of one piece of work on stderr. Iterate over it, or call `update` after each step.

    Args:
        steps: the steps that are left, for iteration.
        what: names the work.
        total: number of all steps, those of earlier runs included.
        done: number of steps that earlier runs have done. A bar starts there.
        unit: what a step is.
        shown: whether to show anything: of several processes one does.
    """

    def __init__(
        self,
        steps: Iterable[int] = (),
        what: str = "",
        total: int | None = None,
        *,
        done: int = 0,
        unit: str = "step",
        shown: bool = True,
    ) -> None:
        self.steps, self.what, self.total, self.first, self.unit = steps, what, total, done, unit
        self.n, self.facts = done, ""
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit=unit, initial=done, disable=not terminal)
        self._log = shown and not terminal
        self._started = self._printed = time.monotonic()

    def update(self, n: int = 1, **facts: str) -> None:
        """Count `n` steps. `facts` are shown beside them."""
        self.n += n
        self.note(**facts)
        self._bar.update(n)
        now = time.monotonic()
        if self._log and now - self._printed >= LOG_SECONDS:
            self._printed = now
            self._print(self._left(now))

    def note(self, **facts: str) -> None:
        """Show these facts beside the count from now on."""
        if facts:
            self.facts = ", ".join(f"{name} {value}" for name, value in facts.items())
            self._bar.set_postfix(facts)

    def start(self, what: str) -> None:
        """Go on to another stage: in a log the one before ends with a line."""
        if what != self.what:
            self._end()
            self.what, self.n, self.first, self.facts, self._started = what, 0, 0, "", time.monotonic()
            self._bar.reset()
            self._bar.set_description(what, refresh=False)

    def __iter__(self) -> Iterator[int]:
        with self:
            for step in self.steps:
                yield step
                self.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
        if kind is None:
            self._end()

    def _end(self) -> None:
        seconds = time.monotonic() - self._started
        if self._log and self.n > self.first and seconds >= WORTH_A_LINE:
            self._print(f"done in {seconds:.0f} s")

    def _left(self, now: float) -> str:
        pace = (self.n - self.first) / (now - self._started)
        left = "" if self.total is None else f", {(self.total - self.n) / pace / 60:.0f} minutes left"
        return f"{60 * pace:.1f} a minute{left}"

    def _print(self, end: str) -> None:
        of = f" of {self.total}" if self.total is not None else ""
        facts = f", {self.facts}" if self.facts else ""
        print(f"{self.what}: {self.unit} {self.n}{of}{facts}, {end}", file=sys.stderr)
