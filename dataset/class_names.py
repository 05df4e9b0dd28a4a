"""Names of classes: those of the folders of images, those of the outputs of a network, and how they belong together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from apq.bounds import read_bytes
from apq.errors import UserError
from apq.files import Record, reading

HIDDEN = (".", "__MACOSX")  # how names of folders and files begin that programs leave behind


def class_folders(root: Path) -> list[str]:
    """The names of the class folders in a folder, sorted. UserError where there are none, or no such folder."""
    try:
        names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(HIDDEN))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}") from error
    if not names:
        raise UserError(f"no images in {root}: it must hold one folder of images a class")
    return names


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in a file, one a line. UserError where there are none, and where one is there twice."""
    with reading(path):
        lines = read_bytes(path).decode("utf-8-sig", errors="surrogateescape").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"{path} names no classes: it must have one name a line")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"{path} has the class {twice} twice")
    return names


def digest_of_names(names: Iterable[str]) -> str:
    """A hash of names in their order."""
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()


def names_of_outputs(trained_on: Record | None) -> tuple[str, ...]:
    """The names of a network's classes, in the order of its outputs; () where they are not known.

    `trained_on` identifies the images that it was trained on. Files of earlier versions have no names.
    """
    names = trained_on.get("names") if isinstance(trained_on, dict) else None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names) if trained_on.get("classes") == digest_of_names(names) else ()


def check_among(folder: Path, found: Sequence[str], outputs: Sequence[str]) -> None:
    """UserError unless all classes of a folder are among those of the network's outputs."""
    if unknown := sorted({*found} - {*outputs}):
        few = ", ".join(unknown[:3])
        raise UserError(f"{folder} has images of other classes than the network's {len(outputs)}, such as {few}")
