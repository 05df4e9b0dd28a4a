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
    """Check that a network and the images have the same classes; UserError if not.

    `trained_on` identifies the images that the network in the file `where` was trained on, if they are known.
    """
    if trained_on is not None and trained_on.get("classes") != splits.source.get("classes"):
        raise UserError(f"{where} was trained on images of other classes than these: its outputs mean other classes")


def load_splits(spec: ImageSpec, data_dir: Path | None = None) -> Splits:
    """The images for a space or a model, at its largest resolution: those of its data set, or of a folder.

    Loaders resize them to smaller resolutions. UserError for an unknown data set, and where a folder is needed.
    """
    return load_folder(spec, data_dir) if data_dir is not None else get_dataset(spec.dataset).load(spec)
