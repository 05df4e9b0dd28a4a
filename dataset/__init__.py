"""Images and accuracy pairs. `load_splits` is the way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apq.errors import UserError
from apq.space import SearchSpace
from dataset.digits import digits_splits
from dataset.glyphs import glyphs_splits
from dataset.imagenet import image_folder_splits
from dataset.splits import Splits

IMAGENET = Path("dataset/imagenet")  # where images of ImageNet spaces are looked for

__all__ = ["Splits", "check_classes", "load_splits"]


def check_classes(splits: Splits, trained_on: dict[str, Any] | None, where: Path) -> None:
    """UserError if a network trained on other images, of which `where` holds the record, had other class names."""
    if trained_on is not None and trained_on.get("classes") != splits.source.get("classes"):
        raise UserError(f"{where} was trained on images of other classes than these: its outputs mean something else")


def load_splits(space: SearchSpace, data_dir: Path | None = None) -> Splits:
    """The images of a space, at its largest resolution (loaders resize them): embedded ones, or those of a folder.

    UserError where a folder is needed.
    """
    if data_dir is not None:
        return image_folder_splits(space, data_dir)
    if space.dataset == "digits":
        return digits_splits(space)
    if space.dataset == "glyphs":
        return glyphs_splits(space)
    if space.dataset == "imagenet" and IMAGENET.is_dir():
        return image_folder_splits(space, IMAGENET)
    raise UserError(
        f"space {space.name} needs images: put train/CLASS and val/CLASS in {IMAGENET}, or name another folder: --data"
    )
