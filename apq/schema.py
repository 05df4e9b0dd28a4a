"""What a saved state must look like: checks of plain data and arrays, put together like the data that they check.

A check takes a value and raises UserError where the value does not fit:

    fields(epoch=whole(1, 30), genes=array("i", None, 40), history=each(mapping))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from apq.bounds import LARGEST_NUMBER, is_number, is_whole
from apq.errors import UserError

Check = Callable[[Any], None]
MOST = 1 << 53  # of anything that is counted


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""
    return lambda value: _demand(is_whole(value, low, high), f"it must be a whole number from {low} to {high}")


def number(low: float = -LARGEST_NUMBER, high: float = LARGEST_NUMBER) -> Check:
    """A finite number from `low` to `high`."""
    return lambda value: _demand(is_number(value, low, high), f"it must be a number from {low:g} to {high:g}")


def mapping(value: Any) -> None:
    """An object with any keys, which are names."""
    _demand(isinstance(value, Mapping) and all(isinstance(key, str) for key in value), "it must be an object")


def anything(value: Any) -> None:
    """Any value: the owner of the state checks it."""


def text(value: Any) -> None:
    """A string."""
    _demand(isinstance(value, str), "it must be a string")


def optional(check: Check) -> Check:
    """None, or what passes the check."""
    return lambda value: None if value is None else check(value)


def each(check: Check, n: int | None = None) -> Check:
    """A list whose items pass the check; of `n` of them, if that is given."""

    def check_items(value: Any) -> None:
        _demand(isinstance(value, (list, tuple)), "it must be a list")
        if n is not None:
            _demand(len(value) == n, f"it must have {n} items, not {len(value)}")
        for i, item in enumerate(value):
            _at(f"item {i}", check, item)

    return check_items


def fields(**checks: Check) -> Check:
    """An object with exactly these keys, each with its check."""

    def check_fields(value: Any) -> None:
        mapping(value)
        if missing := checks.keys() - value.keys():
            raise UserError(f"it lacks {', '.join(sorted(missing))}")
        if extra := value.keys() - checks.keys():
            raise UserError(f"it has unknown {', '.join(sorted(extra))}")
        for name, check in checks.items():
            _at(name, check, value[name])

    return check_fields


def array(kind: str, *shape: int | None, low: float = -np.inf, high: float = np.inf) -> Check:
    """A numpy array of a kind of numbers ("i" whole, "f" with a fraction), a shape (None: any length) and a range.

    NaN is never in the range.
    """

    def check_array(value: Any) -> None:
        _demand(isinstance(value, np.ndarray) and value.dtype.kind == kind, f"it must be an array of kind {kind}")
        same = [n in (None, own) for own, n in zip(value.shape, shape, strict=False)]
        _demand(value.ndim == len(shape) and all(same), f"it must have shape {shape}, not {value.shape}")
        _demand(bool(((value >= low) & (value <= high)).all()), f"its numbers must be from {low:g} to {high:g}")

    return check_array


def generator(value: Any) -> None:
    """The state of a random number generator of numpy."""
    try:
        np.random.default_rng(0).bit_generator.state = value
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
        raise UserError("it must be the state of a generator of random numbers") from error


def _demand(fits: bool, why: str) -> None:
    if not fits:
        raise UserError(why)


def _at(place: str, check: Check, value: Any) -> None:
    """Check a part; its error begins with its place."""
    try:
        check(value)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
