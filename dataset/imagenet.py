"""Image folders in ImageNet's layout: images in DIR/train/CLASS and DIR/val/CLASS."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
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
from dataset.image_file import image_suffixes, read_image
from dataset.splits import ImageSpec, Splits, evenly_spaced

HIDDEN = (".", "__MACOSX")  # how names of folders and files begin that programs leave behind
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

    Images that cannot be read are skipped with a warning, see `unreadable`. Files that are no images are counted in a
    line on stderr. UserError where there are no images, where the classes of training and test images differ, and where
    the spec has other numbers of classes or channels.
    """
    images, test = _open(folder, "train"), _open(folder, "val")
    _check_classes(folder, spec, images.classes, test.classes)
    for part in (images, test):
        part.tell_ignored()
    side = spec.resolutions[-1]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = v2.Compose(
        [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), *to_tensor]
    )
    plain = v2.Compose([v2.Resize(round(side / 0.875)), v2.CenterCrop(side), *to_tensor])
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


class ClassFolders(ImageFolder):
    """The images in ROOT/CLASS, at any depth. Hidden folders and files are left out, like files that are no images.

    `broken` marks images that could not be read, in memory that all worker processes share.
    """

    def __init__(self, root: Path) -> None:
        self.suffixes, self.ignored = image_suffixes(), Counter()
        super().__init__(str(root), loader=read_image, is_valid_file=self._is_image, allow_empty=True)
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The names of the classes, each with its number. FileNotFoundError where there are none."""
        found = sorted(os.scandir(directory), key=lambda entry: entry.name)
        names = [entry.name for entry in found if entry.is_dir() and not entry.name.startswith(HIDDEN)]
        if not names:
            raise FileNotFoundError(f"no class folders in {directory}")
        self.ignored["hidden"] += sum(entry.name.startswith(HIDDEN) for entry in found)
        loose = [entry for entry in found if not entry.is_dir() and not entry.name.startswith(HIDDEN)]
        self.ignored["outside of class folders"] += len(loose)
        return names, {name: number for number, name in enumerate(names)}

    def tell_ignored(self) -> None:
        """Print one line to stderr if files were left out, and one if classes have no images."""
        if any(self.ignored.values()):
            counts = ", ".join(f"{n} {what}" for what, n in self.ignored.most_common() if n)
            print(f"ignored in {self.root}: {counts}", file=sys.stderr)
        if empty := len(self.classes) - len(set(self.targets)):
            print(f"warning: {empty} of {len(self.classes)} classes in {self.root} have no images", file=sys.stderr)

    def _is_image(self, path: str) -> bool:
        inside = Path(path).relative_to(self.root)
        suffix, hidden = inside.suffix.lower(), any(name.startswith(HIDDEN) for name in inside.parts)
        if hidden or suffix not in self.suffixes:
            self.ignored["hidden" if hidden else suffix or "without an ending"] += 1
            return False
        return True


class FolderImages(Dataset):
    """Some images of a folder: (index, seed of the augmentation) -> (image, label, seed).

    For an image that cannot be read the item is None, or with `substitute` the next image that can, so that batches
    keep their size.
    """

    def __init__(
        self, folder: ClassFolders, indices: Sequence[int], transform: v2.Transform, *, substitute: bool = False
    ) -> None:
        self.folder, self.indices, self.transform, self.substitute = folder, list(indices), transform, substitute

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
        place = self.indices[i]
        path, label = self.folder.samples[place]
        try:
            check_file(Path(path))
            return self.folder.loader(path), label
        except Exception as error:  # decoders raise exceptions of any type for damaged files, even SyntaxError
            if not self.folder.broken[place]:
                self.folder.broken[place] = True
                print(f"warning: skipping {path}, which cannot be read as an image: {error}", file=sys.stderr)
            return None


def unreadable(dataset: Dataset) -> int:
    """Number of images of a split that were skipped so far because they could not be read."""
    return int(dataset.folder.broken[dataset.indices].sum()) if isinstance(dataset, FolderImages) else 0


def report_unreadable(splits: Splits) -> None:
    """Print one line to stderr if images were skipped because they could not be read."""
    parts = {"training": splits.train, "validation (held out of train)": splits.val, "test (val)": splits.test}
    counts = {part: unreadable(images) for part, images in parts.items()}
    if any(counts.values()):
        skipped = ", ".join(f"{n} of {part}" for part, n in counts.items() if n)
        print(f"images skipped because they could not be read: {skipped}", file=sys.stderr)


def _check_classes(folder: Path, spec: ImageSpec, train: Sequence[str], test: Sequence[str]) -> None:
    """UserError unless training and test images have the same classes, as many as the spec, which has 3 channels."""
    if spec.in_channels != 3:
        raise UserError(f"images of {folder} have 3 channels; {spec.name} has {spec.in_channels}")
    apart = {"train": sorted({*train} - {*test}), "val": sorted({*test} - {*train})}
    if train != test:
        only = [f"only {part} has {', '.join(names[:3])}" for part, names in apart.items() if names]
        raise UserError(f"{folder} has {len(train)} training and {len(test)} test classes: {'; '.join(only)}")
    if len(train) != spec.n_classes:
        n = f"{len(train)} training and {len(test)} test classes"
        raise UserError(f"{folder} has {n}; {spec.name} has {spec.n_classes}")


def _digest(names: Iterable[str]) -> str:
    """A hash of names, not of contents: a million files need not be read."""
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()


def _open(folder: Path, part: str) -> ClassFolders:
    """The images of one part of a folder. UserError where there are none."""
    try:
        images = ClassFolders(folder / part)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no images in {folder / part}: it must hold one folder of images a class") from error
    except OSError as error:
        raise UserError(f"cannot read {folder / part}: {error.strerror}") from error
    if not len(images):
        raise UserError(f"no images in {folder / part}: it must hold one folder of images a class")
    return images
