"""Images and accuracy pairs. `load_splits` is the way in."""

from __future__ import annotations

from pathlib import Path

from apq.errors import UserError
from apq.space import SearchSpace
from dataset.digits import digits_splits
from dataset.glyphs import glyphs_splits
from dataset.imagenet import image_folder_splits
from dataset.splits import Splits

IMAGENET = Path("dataset/imagenet")  # where images of ImageNet spaces are looked for

__all__ = ["Splits", "load_splits"]


def load_splits(space: SearchSpace, data_dir: Path | None = None) -> Splits:
    """The images of a space: embedded ones, or those of an image folder; UserError where a folder is needed.

    They come at the space's one resolution; a space of several can be priced and searched, but not trained yet.
    """
    if len(space.resolutions) > 1:
        raise UserError(f"space {space.name} has resolutions {space.resolutions}: images of one only can be loaded")
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
