"""Images and accuracy pairs. `load_splits` is the way in; `table.DATASETS` has a row for each data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from apq.errors import UserError
from apq.files import Record
from dataset.table import get_dataset, load_folder

if TYPE_CHECKING:
    from dataset.splits import ImageSpec, Splits

__all__ = ["check_classes", "load_splits"]


def check_classes(splits: Splits, trained_on: Record | None, where: Path) -> None:
    """UserError if a network trained on other images, recorded in the file `where`, had other class names."""
    if trained_on is not None and trained_on.get("classes") != splits.source.get("classes"):
        raise UserError(f"{where} was trained on images of other classes than these: its outputs mean something else")


def load_splits(spec: ImageSpec, data_dir: Path | None = None) -> Splits:
    """The images of a space or a model, at its largest resolution: those of its data set, or of a folder.

    Loaders resize them. UserError where a folder is needed, or where no data set has the name.
    """
    return load_folder(spec, data_dir) if data_dir is not None else get_dataset(spec.dataset).load(spec)
