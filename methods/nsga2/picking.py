"""Points of a front for budgets that are named later: `latency<=8.4,energy<2`."""

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
    """At most `limit` of the cost `name`; less than that where `strict`."""

    name: str
    limit: float
    strict: bool = False

    def __str__(self) -> str:
        return f"{self.name}{'<' if self.strict else '<='}{self.limit:.15g}"

    def holds(self, values: np.ndarray) -> np.ndarray:
        """(n,) bool: which costs `(n,)` it allows."""
        return values < self.limit if self.strict else values <= self.limit


def parse_bounds(text: str | None, costs: Sequence[str]) -> tuple[Bound, ...]:
    """The bounds of `--pick`, each on one of these costs; none where there is no text.

    >>> parse_bounds("latency<=8.4, size<9000", ("latency", "size"))
    (Bound(name='latency', limit=8.4, strict=False), Bound(name='size', limit=9000.0, strict=True))
    """
    if text is None:
        return ()
    return tuple(_parse_bound(part, costs) for part in text.split(","))


def _parse_bound(text: str, costs: Sequence[str]) -> Bound:
    found = BOUND.fullmatch(text)
    if not found:
        raise UserError(f"--pick {text.strip()!r} is not COST<=NUMBER or COST<NUMBER, say {costs[0]}<=8.4")
    name, operator, number = found.groups()
    if name not in costs:
        raise UserError(f"--pick {text.strip()!r}: {name!r} is no cost of this front; known: {', '.join(costs)}")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UserError(f"--pick {text.strip()!r}: {number!r} is not a number")
    return Bound(name, limit, operator == "<")


def pick(bounds: Sequence[Bound], accuracy: np.ndarray, costs: Mapping[str, np.ndarray]) -> int:
    """Index of the most accurate of points `(n,)` within all bounds, of equal ones the first.

    UserError where none is, which names the cheapest point's costs.
    """
    fits = np.ones(len(accuracy), dtype=bool)
    for bound in bounds:
        fits &= bound.holds(costs[bound.name])
    if not fits.any():
        asked = " and ".join(map(str, bounds))
        lowest = ", ".join(f"{name} {costs[name].min():.6g}" for name in dict.fromkeys(b.name for b in bounds))
        each = all(bound.holds(costs[bound.name]).any() for bound in bounds)
        reason = "each is met by some, but not together" if each else f"the cheapest: {lowest}"
        raise UserError(f"no point of the front has {asked}; {reason}")
    return int(np.argmax(np.where(fits, accuracy, -np.inf)))
