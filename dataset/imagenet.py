"""Image folders in ImageNet's layout: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from apq.bounds import check_file
from apq.errors import UserError
from apq.model import ModelSpec, subnet_model
from apq.space import SearchSpace
from dataset.splits import ImageSpec, Splits, evenly_spaced

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLIT_SEED = 0
VAL_SHARE, MAX_VAL = 0.1, 10_000  # held out of the training images; OFA and APQ hold out 10,000


def image_folder_space(space: SearchSpace, folder: Path) -> SearchSpace:
    """The space for the images of a folder: their number of classes, 3 channels, a name of its own, no recipe."""
    classes = len(_open(folder, "train").classes)
    if space.dataset == "imagenet" and classes == space.n_classes:
        return space
    name = f"{space.name}-{folder.resolve().name}"
    return replace(space, name=name, dataset="imagenet", n_classes=classes, in_channels=3, recipe=None)


def image_folder_model(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The model for the images of a folder: their number of classes, 3 channels. A named network keeps its name."""
    if spec.space is not None:
        return subnet_model(image_folder_space(spec.space, folder), spec.subnet)
    return replace(spec, dataset="imagenet", n_classes=len(_open(folder, "train").classes), in_channels=3)


def image_folder_splits(spec: ImageSpec, folder: Path) -> Splits:
    """Training and validation images from DIR/train, test images from DIR/val, at the spec's largest resolution.

    Images that cannot be read are skipped with a warning, see `unreadable`. UserError where there are no images, or
    where the spec has other numbers of classes or channels.
    """
    side = spec.resolutions[-1]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = v2.Compose(
        [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), *to_tensor]
    )
    plain = v2.Compose([v2.Resize(round(side / 0.875)), v2.CenterCrop(side), *to_tensor])
    if spec.in_channels != 3:
        raise UserError(f"images of {folder} have 3 channels; {spec.name} has {spec.in_channels}")
    images, test = _open(folder, "train"), _open(folder, "val")
    if len(images.classes) != spec.n_classes or images.classes != test.classes:
        raise UserError(
            f"{folder} has {len(images.classes)} training and {len(test.classes)} test classes; "
            f"{spec.name} has {spec.n_classes}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    n_val = max(1, min(MAX_VAL, round(VAL_SHARE * len(order))))
    val, train = order[:n_val], order[n_val:]
    if not train:
        raise UserError(f"{folder}/train has {len(order)} image(s): too few to hold some out for validation")
    return Splits(
        train=FolderImages(images, train, augment, substitute=True),
        calibration=FolderImages(images, train, plain, substitute=True),
        val=FolderImages(images, val, plain),
        test=FolderImages(test, range(len(test)), plain),
        source={
            "dataset": "image folder",
            "n_train": len(order),
            "files": _digest(str(Path(path).relative_to(folder)) for path, _ in images.samples),
            "classes": _digest(images.classes),
        },
    )


class FolderImages(Dataset):
    """Some images of a folder: (index, seed of the augmentation) -> (image, label, seed).

    For an image that cannot be read the item is None, or with `substitute` the next image that can, so that batches
    keep their size. `broken` marks images that could not be read, in memory that all worker processes share.
    """

    def __init__(
        self, folder: ImageFolder, indices: Sequence[int], transform: v2.Transform, *, substitute: bool = False
    ) -> None:
        self.folder, self.indices, self.transform, self.substitute = folder, list(indices), transform, substitute
        self.broken = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | None:
        first, seed = key
        for i in range(first, first + (len(self) if self.substitute else 1)):
            read = self._read(i % len(self))
            if read is not None:
                image, label = read
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    return self.transform(image), label, seed
        if self.substitute:
            raise UserError(f"no image of {self.folder.root} can be read")
        return None

    def thinned(self, n: int) -> FolderImages:
        """At most n of the images, evenly spaced."""
        chosen = [self.indices[i] for i in evenly_spaced(len(self), n)]
        return FolderImages(self.folder, chosen, self.transform, substitute=self.substitute)

    def _read(self, i: int) -> tuple[Image.Image, int] | None:
        path, label = self.folder.samples[self.indices[i]]
        try:
            check_file(Path(path))
            return self.folder.loader(path), label
        except Exception as error:  # decoders raise exceptions of any type for damaged files, even SyntaxError
            if not self.broken[i]:
                print(f"warning: skipping {path}, which cannot be read as an image: {error}", file=sys.stderr)
                self.broken[i] = True
            return None


def unreadable(dataset: Dataset) -> int:
    """Number of images of a split that were skipped so far because they could not be read."""
    return int(dataset.broken.sum()) if isinstance(dataset, FolderImages) else 0


def report_unreadable(splits: Splits) -> None:
    """Print one line to stderr if images were skipped because they could not be read."""
    counts = {part: unreadable(getattr(splits, part)) for part in ("train", "val", "test")}
    if any(counts.values()):
        skipped = ", ".join(f"{n} of {part}" for part, n in counts.items() if n)
        print(f"images skipped because they could not be read: {skipped}", file=sys.stderr)


def _digest(names: Iterable[str]) -> str:
    """A hash of names, not of contents: a million files need not be read."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _open(folder: Path, part: str) -> ImageFolder:
    """The images of one part of a folder. Warns of classes without images. UserError where there are no images."""
    try:
        images = ImageFolder(str(folder / part), allow_empty=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no images in {folder / part}: it must hold one folder of images a class") from error
    if not len(images):
        raise UserError(f"no images in {folder / part}: it must hold one folder of images a class")
    if empty := len(images.classes) - len(set(images.targets)):
        print(f"warning: {empty} of {len(images.classes)} classes in {folder / part} have no images", file=sys.stderr)
    return images
