"""The state of a search for a front on disk, so that one that was killed continues and finds the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.files import atomic_open, read_arrays

ARRAYS = ("genes", "values", "ranks", "crowding")


@dataclass(frozen=True, kw_only=True)
class FrontState:
    """All that the next generation depends on: the population and how it was sorted, generator, records."""

    genes: np.ndarray  # (n, genes)
    values: np.ndarray  # (n, objectives)
    ranks: np.ndarray  # (n,)
    crowding: np.ndarray  # (n,)
    rng: dict[str, Any]
    history: list[dict[str, Any]]


def save_front_state(file: Path, state: FrontState, asked: dict[str, Any]) -> None:
    """Write a state and what was asked of its search, as plain arrays and JSON."""
    facts = {"asked": asked, "rng": state.rng, "history": state.history}
    with atomic_open(file, "wb") as out:
        np.savez(out, facts=np.array(json.dumps(facts)), **{name: getattr(state, name) for name in ARRAYS})


def load_front_state(file: Path, asked: dict[str, Any]) -> FrontState | None:
    """The state in a file, if there is one; UserError if it is damaged or of a search with other settings."""
    if not file.exists():
        return None
    try:
        arrays = read_arrays(file)
        facts = json.loads(str(arrays.pop("facts")))
        found = facts["asked"]
        state = FrontState(**{name: arrays[name] for name in ARRAYS}, rng=facts["rng"], history=facts["history"])
        odd = ", ".join(sorted(key for key, value in json.loads(json.dumps(asked)).items() if found.get(key) != value))
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged; remove it, and the search starts anew") from error
    if odd or set(found) != set(asked):
        odd = odd or "other things"
        raise UserError(f"{file} is of an unfinished search with other {odd}; give --overwrite or remove it")
    return state
