"""Names from flags and files that become parts of paths."""

from __future__ import annotations

import os
from typing import Any

from apq.errors import UserError

MOST_BYTES = 255  # of a name, as file systems take them


def plain_name(text: Any, what: str) -> str:
    """The text, if it can be the name of one file or folder. UserError names it by `what` otherwise.

    A name has no separators and no control characters, is not "." or "..", is text of any language in UTF-8 (so no lone
    surrogates, which stand for bytes that are not text) and has at most MOST_BYTES bytes.

    >>> plain_name("my-space", "the space")
    'my-space'
    """
    if (wrong := _fault_of(text)) is not None:
        raise UserError(f"{what} must be a plain name, not {shown(text)}: {wrong}")
    return text


def _fault_of(text: Any) -> str | None:
    if not isinstance(text, str):
        return "it is not text"
    if text in ("", ".", ".."):
        return "it names no folder of its own"
    if {"/", "\\", os.sep} & {*text}:
        return "it holds a separator of folders"
    if not text.isprintable():  # control characters, line ends and lone surrogates among them
        return "it holds characters that cannot be shown"
    if text != text.strip():
        return "it begins or ends with a space"
    if (n_bytes := len(text.encode())) > MOST_BYTES:
        return f"it has {n_bytes} bytes, more than {MOST_BYTES}"
    return None


def shown(text: Any) -> str:
    """A value in quotes for a message, cut where it is long."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."
