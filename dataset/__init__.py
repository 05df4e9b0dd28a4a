"""Images and accuracy pairs. `load_splits` is the way in; `table.DATASETS` has a row for each data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apq.errors import UserError
from apq.files import Record
from dataset.class_names import names_of_outputs
from dataset.color_jitter import ColorJitter
from dataset.table import DATASETS, get_dataset

if TYPE_CHECKING:
    from dataset.splits import ImageSpec, Splits

__all__ = ["check_classes", "image_folder", "load_splits", "names_of_outputs", "recorded_folder"]


def check_classes(splits: Splits, trained_on: Record | None, where: Path) -> None:
    """Check that a network and the images have the same classes; UserError if not.

    `trained_on` identifies the images that the network in the file `where` was trained on, if they are known.
    """
    if trained_on is not None and trained_on.get("classes") != splits.source.get("classes"):
        raise UserError(f"{where} was trained on images of other classes than these: its outputs mean other classes")


def image_folder(given: Path | None, *recorded: Any) -> Path | None:
    """The image folder that is given, or else the first that earlier work recorded; None where there is neither.

    UserError where the recorded one is not there any more.
    """
    known = next((Path(path) for path in recorded if isinstance(path, str)), None)
    if given is None and known is not None and not known.is_dir():
        raise UserError(f"the images were in {known}, which is not there: give their folder with --data")
    return given or known


def recorded_folder(folder: Path | None) -> Record:
    """What is recorded of an image folder, so that later work needs no --data; {} where there is none."""
    return {} if folder is None else {"data": str(folder.resolve())}


def load_splits(
    spec: ImageSpec,
    data_dir: Path | None = None,
    color_jitter: ColorJitter | None = None,
    outputs: Sequence[str] = (),
) -> Splits:
    """The images for a space or a model, at its largest resolution: those of its data set, or of a folder.

    A folder holds the files of the data set, or images in class folders.

    Loaders have them at smaller resolutions too. UserError for an unknown data set, and where a folder is needed.
    `color_jitter` and `outputs`, the names of the network's classes, matter for folders alone, see
    `image_folder_splits`. Data sets in memory have their own augmentation, and all classes.
    """
    row = DATASETS.get(spec.dataset) if data_dir is not None else get_dataset(spec.dataset)
    if row is not None and row.load_files is not None and (data_dir is None or row.is_in(data_dir)):
        return row.load_files(spec, data_dir)
    if data_dir is None and row.load is not None:
        return row.load(spec)
    folder = row.folder if data_dir is None else data_dir
    if data_dir is None and not folder.is_dir():
        raise UserError(
            f"{spec.name} needs images: put train/CLASS and val/CLASS in {folder}, or give another folder with --data"
        )
    from dataset.imagenet import image_folder_splits

    return image_folder_splits(spec, folder, color_jitter, outputs)
