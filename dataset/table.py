"""The data sets: one row each. Importing this module imports neither torch nor any images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apq.errors import UserError

if TYPE_CHECKING:
    from dataset.splits import ImageSpec, Splits

IMAGENET = Path("dataset/imagenet")  # where images of ImageNet spaces are looked for


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Images that networks are trained and tested on.

    Args:
        name: what spaces and models call it in their `dataset`.
        in_channels, n_classes, side: what networks by name are built for; `side` is in pixels.
        load: makes the images for a space or a model, at its channels and its largest resolution.
        recipe: the training recipe of networks for these images that have none of their own.
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
            f"{spec.name} needs images: put train/CLASS and val/CLASS in {IMAGENET}, or name another folder: --data"
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
        raise UserError(f"unknown images {name!r}; known: {', '.join(DATASETS)}; --data takes a folder of any others")
    return DATASETS[name]
