"""Crops of three photographs that come with scikit-learn and matplotlib, as a folder of classes.

A stand-in where no images of ImageNet can be had. The class of a crop is what a float network says, so that accuracy on
the folder is the agreement with that network, and nothing more. The crops of a photograph overlap and are alike: they
show whether a network computes what it should, not how good it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import matplotlib.cbook
import sklearn.datasets
import torch
from PIL import Image, ImageOps
from torch import nn

from apq.model import ModelSpec
from dataset.crops import central_crop
from dataset.file_batches import normalised
from dataset.image_file import Picture, read_image
from dataset.table import scale_of_folders

GRIDS = {1.0: 3, 0.75: 3, 0.5: 4}  # by the share of the shorter side that a crop has: places along the longer side
LEAST = 3  # crops of a class: one each to train on, to validate on, and to test on
CLASSES = "classes.txt"  # names the classes of all outputs, in their order


def photographs() -> list[Path]:
    """A palace and a flower of scikit-learn, a portrait of matplotlib."""
    folder = Path(sklearn.datasets.__file__).parent / "images"
    portrait = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [folder / "china.jpg", folder / "flower.jpg", Path(portrait)]


def crops_of(photograph: Image.Image) -> Iterator[Image.Image]:
    """Squares of three sizes at places on a grid, each also mirrored."""
    width, height = photograph.size
    for share, places in GRIDS.items():
        side = round(share * min(width, height))
        columns, rows = (sorted({round(i * (n - side) / (places - 1)) for i in range(places)}) for n in (width, height))
        for left, top in product(columns, rows):
            crop = photograph.crop((left, top, left + side, top + side))
            yield from (crop, ImageOps.mirror(crop))


@torch.inference_mode()
def write_folder(folder: Path, net: nn.Module, spec: ModelSpec) -> tuple[int, int, int]:
    """Write `folder`/train/CLASS, `folder`/val/CLASS and `folder`/classes.txt; every third crop of a class is for val.

    Returns the numbers of crops in train and in val, and of classes. Classes with fewer than LEAST crops are left out.
    """
    scale, of_class = scale_of_folders(spec.name), {}
    for photograph in photographs():
        for crop in crops_of(read_image(photograph)):
            image = normalised(central_crop(spec.resolution).pixels(Picture(crop)), scale)
            of_class.setdefault(int(net(image[None]).argmax()), []).append(crop)
    kept = {label: crops for label, crops in of_class.items() if len(crops) >= LEAST}
    counts = {"train": 0, "val": 0}
    for label, crops in kept.items():
        for i, crop in enumerate(crops):
            part = "val" if i % LEAST == LEAST - 1 else "train"
            place = folder / part / _name(label)
            place.mkdir(parents=True, exist_ok=True)
            crop.save(place / f"{i}.png")
            counts[part] += 1
    (folder / CLASSES).write_text("".join(f"{_name(i)}\n" for i in range(spec.n_classes)))
    return counts["train"], counts["val"], len(kept)


def _name(label: int) -> str:
    return f"output{label:04d}"
