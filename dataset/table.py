"""The table of data sets. This module imports neither torch nor images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apq.errors import UserError

if TYPE_CHECKING:
    from dataset.splits import ImageSpec, Splits

IMAGENET = Path("dataset/imagenet")  # the default image folder of ImageNet spaces


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A row of the table: images that networks are trained and tested on.

    Args:
        name: the name in the field `dataset` of spaces and models.
        in_channels, n_classes, side: input channels, classes and resolution in pixels of networks by name.
        load: makes the splits for a space or a model, with its channels and at its largest resolution.
        recipe: training recipe of networks that have none of their own.
    """

    name: str
    in_channels: int
    n_classes: int
    side: int
    load: Callable[[ImageSpec], Splits]
    recipe: str | None = None


def _load_imagenet(spec: ImageSpec) -> Splits:
    if not IMAGENET.is_dir():
        raise UserError(
            f"{spec.name} needs images: put train/CLASS and val/CLASS in {IMAGENET}, or give another folder with --data"
        )
    return load_folder(spec, IMAGENET)


def _load_glyphs(spec: ImageSpec) -> Splits:
    from dataset.glyphs import glyphs_splits

    return glyphs_splits(spec)


def _load_digits(spec: ImageSpec) -> Splits:
    from dataset.digits import digits_splits

    return digits_splits(spec)


def load_folder(spec: ImageSpec, folder: Path) -> Splits:
    """The images in FOLDER/train/CLASS and FOLDER/val/CLASS."""
    from dataset.imagenet import image_folder_splits

    return image_folder_splits(spec, folder)


# A row from outside is added with `DATASETS["mine"] = DataSet(name="mine", ...)`.
DATASETS = {
    row.name: row
    for row in (
        DataSet(name="imagenet", in_channels=3, n_classes=1000, side=224, load=_load_imagenet),
        DataSet(name="glyphs", in_channels=1, n_classes=62, side=32, load=_load_glyphs, recipe="glyphs"),
        DataSet(name="digits", in_channels=1, n_classes=10, side=32, load=_load_digits, recipe="digits"),
    )
}


def get_dataset(name: str) -> DataSet:
    """The data set of this name; UserError names the known ones."""
    if name not in DATASETS:
        others = "give a folder of others with --data; APQ_PLUGINS may add some"
        raise UserError(f"unknown images {name!r}; known: {', '.join(DATASETS)}; {others}")
    return DATASETS[name]
