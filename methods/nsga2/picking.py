"""Choice of a point on a front by bounds such as `latency<=8.4,energy<2`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apq.errors import UserError

BOUND = re.compile(r"\s*(\w+)\s*(<=|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Bound:
    """A bound: the cost `name` is at most `limit`, or below it if `strict`."""

    name: str
    limit: float
    strict: bool = False

    def __str__(self) -> str:
        return f"{self.name}{'<' if self.strict else '<='}{self.limit:.15g}"

    def holds(self, values: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the costs `(n,)` are within the bound."""
        return values < self.limit if self.strict else values <= self.limit


def parse_bounds(text: str | None, costs: Sequence[str]) -> tuple[Bound, ...]:
    """Parse the bounds of `--pick`, each on one of `costs`. None has no bounds. UserError for other text.

    >>> parse_bounds("latency<=8.4, size<9000", ("latency", "size"))
    (Bound(name='latency', limit=8.4, strict=False), Bound(name='size', limit=9000.0, strict=True))
    """
    if text is None:
        return ()
    return tuple(_parse_bound(part, costs) for part in text.split(","))


def _parse_bound(text: str, costs: Sequence[str]) -> Bound:
    found = BOUND.fullmatch(text)
    if not found:
        raise UserError(f"--pick {text.strip()!r} is not COST<=NUMBER or COST<NUMBER, for example {costs[0]}<=8.4")
    name, operator, number = found.groups()
    if name not in costs:
        raise UserError(f"--pick {text.strip()!r}: {name!r} is not a cost of this front; known: {', '.join(costs)}")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UserError(f"--pick {text.strip()!r}: {number!r} is not a number")
    return Bound(name, limit, operator == "<")


def within(bounds: Sequence[Bound], costs: Mapping[str, np.ndarray]) -> np.ndarray:
    """(n,) bool: which points are within all bounds. `costs` are (n,) by name."""
    fits = np.ones(len(next(iter(costs.values()))), dtype=bool)
    for bound in bounds:
        fits &= bound.holds(costs[bound.name])
    return fits


def pick(bounds: Sequence[Bound], accuracy: np.ndarray, costs: Mapping[str, np.ndarray]) -> int:
    """Index of the most accurate point within all bounds, the first of equal ones. All arrays are `(n,)`.

    UserError if no point is within them; it names the lowest costs.
    """
    fits = within(bounds, costs)
    if not fits.any():
        all_bounds = " and ".join(map(str, bounds))
        lowest = ", ".join(f"{name} {costs[name].min():.6g}" for name in dict.fromkeys(b.name for b in bounds))
        each = all(bound.holds(costs[bound.name]).any() for bound in bounds)
        reason = "each bound is met by some, but not all together" if each else f"the cheapest: {lowest}"
        raise UserError(f"no point of the front has {all_bounds}; {reason}")
    return int(np.argmax(np.where(fits, accuracy, -np.inf)))
