"""The table of data sets. This module imports neither torch nor images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apq.errors import UserError
from apq.own_networks import LITES

if TYPE_CHECKING:
    from dataset.splits import ImageSpec, Splits

IMAGENET = Path("dataset/imagenet")  # the default image folder of ImageNet spaces


@dataclass(frozen=True)
class Scale:
    """How pixels from 0 to 1 become what a network sees: (pixel - mean) / std, one of each for all channels or each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def ends(self) -> tuple[float, float]:
        """What the lowest and the highest pixel become, of all channels."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return min(-mean / std for mean, std in pairs), max((1 - mean) / std for mean, std in pairs)


PHOTOS = Scale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of images in folders, as in torchvision
# That of EfficientNet-Lite: MEAN_RGB and STDDEV_RGB of efficientnet_lite_builder.py in https://github.com/tensorflow/tpu.
# Its crops are those of all images in folders: bilinear (main.py there), a central share of 0.875 (preprocessing.py).
LITE = Scale((127 / 255,) * 3, (128 / 255,) * 3)
OF_NETWORKS = dict.fromkeys(LITES, LITE)  # scales of images in folders for networks by name that have their own
GLYPHS = Scale((0.263,), (0.165,))  # of all training pixels
DIGITS = Scale((0.3053,), (0.3760,))  # of all pixels
FASHION = Scale((0.2860,), (0.3530,))  # of all training pixels


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A row of the table: images that networks are trained and tested on.

    Args:
        name: the name in the field `dataset` of spaces and models.
        in_channels, n_classes, side: input channels, classes and resolution in pixels of networks by name.
        load: makes the splits for a space or a model, with its channels and at its largest resolution.
        load_files: the same from files in a folder, which is None unless --data names it.
        file: one of these files, by which their folder is told from one of images in class folders.
        folder: where the images are, unless --data names another place, of a data set that is a folder.
        recipe: training recipe of networks that have none of their own.
        scale: how its pixels are scaled, as exported networks tell and need; None where it is not known.

    UserError unless there is one of `load`, `load_files` and `folder`.
    """

    name: str
    in_channels: int
    n_classes: int
    side: int
    load: Callable[[ImageSpec], Splits] | None = None
    load_files: Callable[[ImageSpec, Path | None], Splits] | None = None
    file: str | None = None
    folder: Path | None = None
    recipe: str | None = None
    scale: Scale | None = None

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.load, self.load_files, self.folder)) != 1:
            raise UserError(f"data set {self.name!r} needs a function `load` or `load_files`, or a folder")

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has the files of this data set, gzipped or not."""
        return self.file is not None and any((folder / f"{self.file}{end}").exists() for end in ("", ".gz"))


def _load_glyphs(spec: ImageSpec) -> Splits:
    from dataset.glyphs import glyphs_splits

    return glyphs_splits(spec)


def _load_fashion(spec: ImageSpec, folder: Path | None) -> Splits:
    from dataset.fashion import fashion_splits

    return fashion_splits(spec, folder)


def _load_digits(spec: ImageSpec) -> Splits:
    from dataset.digits import digits_splits

    return digits_splits(spec)


# A row from outside is added with `DATASETS["mine"] = DataSet(name="mine", ...)`.
DATASETS = {
    row.name: row
    for row in (
        DataSet(name="imagenet", in_channels=3, n_classes=1000, side=224, folder=IMAGENET, scale=PHOTOS),
        DataSet(name="glyphs", in_channels=1, n_classes=62, side=32, load=_load_glyphs, recipe="glyphs", scale=GLYPHS),
        DataSet(
            name="fashion",
            in_channels=1,
            n_classes=10,
            side=28,
            load_files=_load_fashion,
            file="t10k-labels-idx1-ubyte",
            recipe="fashion",
            scale=FASHION,
        ),
        DataSet(name="digits", in_channels=1, n_classes=10, side=32, load=_load_digits, recipe="digits", scale=DIGITS),
    )
}


def scale_of_folders(network: str) -> Scale:
    """How images in folders are scaled for a network or space of this name."""
    return OF_NETWORKS.get(network, PHOTOS)


def get_dataset(name: str) -> DataSet:
    """The data set of this name; UserError names the known ones."""
    if name not in DATASETS:
        others = "give a folder of others with --data; APQ_PLUGINS may add some"
        raise UserError(f"unknown images {name!r}; known: {', '.join(DATASETS)}; {others}")
    return DATASETS[name]
