"""Image folders in ImageNet's layout: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg. Any such folder works."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from apq.errors import UserError
from apq.space import SearchSpace
from dataset.splits import Splits

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLIT_SEED = 0
VAL_SHARE, MAX_VAL = 0.1, 10_000  # held out of the training images; OFA and APQ hold out 10,000


def image_folder_space(space: SearchSpace, folder: Path) -> SearchSpace:
    """The space fitted to a folder: its number of classes, three channels, a name of its own."""
    classes = len(_open(folder, "train", None).classes)
    if space.dataset == "imagenet" and classes == space.n_classes:
        return space
    name = f"{space.name}-{folder.resolve().name}"
    return replace(space, name=name, dataset="imagenet", n_classes=classes, in_channels=3)


def image_folder_splits(space: SearchSpace, folder: Path) -> Splits:
    """Train and validation images from DIR/train, test images from DIR/val; UserError where there are none."""
    side = space.resolutions[-1]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = v2.Compose(
        [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), *to_tensor]
    )
    plain = v2.Compose([v2.Resize(round(side / 0.875)), v2.CenterCrop(side), *to_tensor])
    if space.in_channels != 3:
        raise UserError(f"images of {folder} have 3 channels; space {space.name} has {space.in_channels}")
    augmented, clean, test = _open(folder, "train", augment), _open(folder, "train", plain), _open(folder, "val", plain)
    if len(augmented.classes) != space.n_classes or augmented.classes != test.classes:
        raise UserError(
            f"{folder} has {len(augmented.classes)} training and {len(test.classes)} test classes; "
            f"space {space.name} has {space.n_classes}"
        )
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    n_val = max(1, min(MAX_VAL, round(VAL_SHARE * len(order))))
    val, train = order[:n_val], order[n_val:]
    if not train:
        raise UserError(f"{folder}/train has {len(order)} image(s): too few to hold some out for validation")
    return Splits(
        train=Subset(augmented, train),
        calibration=Subset(clean, train),
        val=Subset(clean, val),
        test=test,
        source={"dataset": "image folder", "n_train": len(order), "digest": _digest(folder, clean)},
    )


def _digest(folder: Path, images: ImageFolder) -> str:
    """Identity of a folder by the names of its training images: it may move, its images may not change."""
    names = (f"{Path(path).relative_to(folder)}\n".encode() for path, _ in images.samples)
    return hashlib.sha256(b"".join(names)).hexdigest()


def _load_image(path: str) -> Image.Image:
    try:
        return default_loader(path)
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error}") from error


def _open(folder: Path, part: str, transform: v2.Transform | None) -> ImageFolder:
    try:
        return ImageFolder(str(folder / part), transform, loader=_load_image)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no images in {folder / part}: it must hold one folder of images a class") from error
