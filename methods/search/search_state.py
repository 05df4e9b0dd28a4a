"""The state of a search on disk, so that one that was killed continues and finds the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.files import atomic_open, read_arrays

ARRAYS = ("genes", "accuracies", "costs", "seen")


@dataclass(frozen=True, kw_only=True)
class SearchState:
    """All that the next generation depends on: pool, keys of what was seen, generator, records."""

    genes: np.ndarray  # (n, genes), best first
    accuracies: np.ndarray  # (n,)
    costs: np.ndarray  # (n,)
    seen: np.ndarray  # (candidates,) sorted
    rng: dict[str, Any]
    history: list[dict[str, Any]]
    since_better: int


def save_state(file: Path, state: SearchState, asked: dict[str, Any]) -> None:
    """Write a state and what was asked of its search, as plain arrays and JSON."""
    facts = {"asked": asked, "rng": state.rng, "history": state.history, "since_better": state.since_better}
    with atomic_open(file, "wb") as out:
        np.savez(out, facts=np.array(json.dumps(facts)), **{name: getattr(state, name) for name in ARRAYS})


def load_state(file: Path, asked: dict[str, Any]) -> SearchState | None:
    """The state in a file, if there is one; UserError if it is damaged or of a search with other settings."""
    if not file.exists():
        return None
    try:
        arrays = read_arrays(file)
        facts = json.loads(str(arrays.pop("facts")))
        found, rest = facts["asked"], {name: facts[name] for name in ("rng", "history", "since_better")}
        state = SearchState(**{name: arrays[name] for name in ARRAYS}, **rest)
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; remove it, and the search starts anew") from error
    if found != json.loads(json.dumps(asked)):
        odd = ", ".join(sorted(key for key in asked if found.get(key) != asked[key])) or "other things"
        raise UserError(f"{file} is of an unfinished search with other {odd}; give --overwrite or remove it")
    return state
