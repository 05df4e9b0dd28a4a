"""Rows of printed tables."""

from __future__ import annotations

from collections.abc import Sequence

from apq.policy import Policy


def bit_rows(policy: Policy) -> list[tuple[str, ...]]:
    """The bits of every layer of a policy."""
    titles = ("layer", "weight bits", "activation bits")[: 1 + len(policy.bits[0])]
    rows: Sequence[tuple[str, ...]] = [
        (name, *("image" if b < 0 else str(b) for b in row))
        for name, row in zip(policy.names, policy.bits, strict=True)
    ]
    return [titles, *rows]
