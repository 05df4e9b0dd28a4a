"""Provenance of a result: command, date, versions, commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from apq import __version__
from apq.errors import UserError

LIBRARIES = ("torch", "torchvision", "numpy")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a result was made. `commit` is None outside a git checkout, and ends in "-dirty" if files were changed."""

    command: str
    date: str  # ISO 8601, UTC
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None


def this_run() -> Provenance:
    """The provenance of what this process writes."""
    versions = {"apq": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Provenance(command=shlex.join(sys.argv), date=date, versions=versions, commit=_commit())


def provenance_from_dict(data: Any) -> Provenance:
    """Back from plain data. Keys of later versions are ignored; UserError where a value cannot be one."""
    kinds = {"command": str, "date": str, "versions": dict, "commit": (str, type(None))}
    if not isinstance(data, dict):
        raise UserError("a record of where a result comes from is an object")
    given = {"command": "", "date": "", **{key: value for key, value in data.items() if key in kinds}}
    if wrong := [key for key, value in given.items() if not isinstance(value, kinds[key])]:
        raise UserError(f"{wrong[0]} cannot be {given[wrong[0]]!r}")
    return Provenance(**given)


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
