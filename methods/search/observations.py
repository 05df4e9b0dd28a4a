"""What an agent observes before each step of an episode: fixed features of the step, and the action before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Observations:
    """The observations of all episodes of one search.

    Attributes:
        rows: (steps, S) float64 features. Column `last` stands for the last action; in the first row it has the value
            with which the first episode begins.
        last: the column of the last action.
        taken: turns actions (n,) from 0 to 1 into what the next steps observe of them, such as bits.
        carried: whether an episode begins with what the second step of the episode before observed, as in HAQ's code
            for linear quantizers, whose rows are changed in place and never restored.
    """

    rows: np.ndarray
    last: int
    taken: Callable[[np.ndarray], np.ndarray] = np.asarray
    carried: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """The number of columns."""
        return self.rows.shape[1]

    @property
    def first(self) -> float:
        """The last action that the first step of the first episode observes."""
        return float(self.rows[0, self.last])

    def episode(self, actions: np.ndarray, first: float) -> np.ndarray:
        """(steps, S) all observations of an episode with these actions (steps,) that begins with `first`."""
        states = self.rows.copy()
        states[0, self.last] = first
        states[1:, self.last] = self.taken(actions[:-1])
        return states

    def first_after(self, states: np.ndarray) -> float:
        """The last action that the first step observes after an episode with these observations (steps, S)."""
        return float(states[1, self.last]) if self.carried and len(states) > 1 else self.first


def with_last_action(features: np.ndarray) -> Observations:
    """Features (steps, S - 1), followed by the last action as it was taken, at first 0 (AMC)."""
    zeros = np.zeros((len(features), 1))
    return Observations(rows=np.concatenate([features, zeros], axis=1, dtype=np.float64), last=-1)
