"""Images and accuracy pairs. `load_splits` is the way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apq.errors import UserError
from dataset.digits import digits_splits
from dataset.glyphs import glyphs_splits
from dataset.imagenet import image_folder_splits
from dataset.splits import ImageSpec, Splits

IMAGENET = Path("dataset/imagenet")  # where images of ImageNet spaces are looked for

__all__ = ["Splits", "check_classes", "load_splits"]


def check_classes(splits: Splits, trained_on: dict[str, Any] | None, where: Path) -> None:
    """UserError if a network trained on other images, of which `where` holds the record, had other class names."""
    if trained_on is not None and trained_on.get("classes") != splits.source.get("classes"):
        raise UserError(f"{where} was trained on images of other classes than these: its outputs mean something else")


def load_splits(spec: ImageSpec, data_dir: Path | None = None) -> Splits:
    """The images of a space or a model, at its largest resolution: embedded ones, or those of a folder.

    Loaders resize them. UserError where a folder is needed.
    """
    if data_dir is not None:
        return image_folder_splits(spec, data_dir)
    if spec.dataset == "digits":
        return digits_splits(spec)
    if spec.dataset == "glyphs":
        return glyphs_splits(spec)
    if spec.dataset == "imagenet" and IMAGENET.is_dir():
        return image_folder_splits(spec, IMAGENET)
    raise UserError(
        f"{spec.name} needs images: put train/CLASS and val/CLASS in {IMAGENET}, or name another folder: --data"
    )
