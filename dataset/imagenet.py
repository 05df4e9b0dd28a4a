"""Image folders in ImageNet's layout: images in DIR/train/CLASS and DIR/val/CLASS."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apq.bounds import check_file
from apq.errors import UserError
from apq.files import Record
from apq.model import ModelSpec, subnet_model
from apq.space import SearchSpace
from dataset.class_names import check_among, digest_of_names
from dataset.color_jitter import ColorJitter
from dataset.image_file import opened
from dataset.splits import ImageSpec, Splits, evenly_spaced
from dataset.table import PHOTOS, Scale, scale_of_folders
from dataset.workers import announce

if TYPE_CHECKING:
    from dataset.class_folders import ClassFolders
    from dataset.crops import View

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


def image_folder_splits(
    spec: ImageSpec, folder: Path, color_jitter: ColorJitter | None = None, outputs: Sequence[str] = ()
) -> Splits:
    """Training and validation images from DIR/train, test images from DIR/val, at the spec's largest resolution.

    Images that cannot be read are skipped with a warning, see `unreadable`. Files that are no images are counted in a
    line on stderr. UserError where there are no images, where the classes of training and test images differ, and where
    the spec has other numbers of classes or channels.

    Args:
        color_jitter: how the colours of training images change at random (None: not at all).
        outputs: names of the network's classes in the order of its outputs, if they are known. The folder may have some
            of them alone; labels are numbers of outputs.
    """
    from dataset.crops import central_crop, random_crop  # import torchvision, which images in memory do not need

    images, test = _open(folder, "train"), _open(folder, "val")
    _check_classes(folder, spec, images.classes, test.classes, outputs)
    for part in (images, test):
        part.tell_ignored()
        if outputs:
            part.outputs = [outputs.index(name) for name in part.classes]
    names = list(outputs) or images.classes
    if len(images.classes) < len(names):
        few = f"{folder} has {len(images.classes)} of the network's {len(names)} classes"
        print(f"{few}: accuracy is that among all {len(names)}", file=sys.stderr)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    n_val = max(1, min(MAX_VAL, round(VAL_SHARE * len(order))))
    val, train = order[:n_val], order[n_val:]
    if not train:
        raise UserError(f"{folder}/train has {len(order)} image(s): too few to hold some out for validation")
    augmented = partial(random_crop, color_jitter=color_jitter)
    how = {"side": spec.resolutions[-1], "scale": scale_of_folders(spec.name)}
    return Splits(
        train=FolderImages(images, train, augmented, **how, substitute=True),
        calibration=FolderImages(images, train, central_crop, **how, substitute=True),
        val=FolderImages(images, val, central_crop, **how),
        test=FolderImages(test, range(len(test)), central_crop, **how),
        source={
            "dataset": "image folder",
            "n_train": len(order),
            # Names, not contents: a million files need not be read.
            "files": digest_of_names(str(Path(path).relative_to(folder)) for path, _ in images.samples),
            "classes": digest_of_names(names),
            "names": names,
            "color_jitter": color_jitter and asdict(color_jitter),
            **_recorded_scale(how["scale"]),
        },
    )


def _recorded_scale(scale: Scale) -> Record:
    """What `source` tells of a scale: nothing of the usual one, so that older records stay those of the same images."""
    return {} if scale == PHOTOS else {"scale": {part: list(values) for part, values in asdict(scale).items()}}


class FolderImages(Dataset):
    """Some images of a folder: (index, seed of the augmentation, side in pixels) -> (pixels, label, seed).

    `view` makes what cuts pictures for a side (`dataset.crops`); a side of None is the `side` of the images. For an
    image that cannot be read the item is None, or with `substitute` the next image that can, so that batches keep their
    size. `scale` says how loaders scale the pixels.
    """

    def __init__(
        self,
        folder: ClassFolders,
        indices: Sequence[int],
        view: Callable[[int], View],
        side: int,
        *,
        substitute: bool = False,
        scale: Scale = PHOTOS,
    ) -> None:
        self.folder, self.indices, self.view, self.side = folder, list(indices), view, side
        self.substitute, self.scale = substitute, scale
        announce(self)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int, int | None]) -> tuple[Tensor, int, int] | None:
        first, seed, side = key
        view = self.view(side or self.side)
        for i in range(first, first + (len(self) if self.substitute else 1)):
            read = self._read(i % len(self), seed, view)
            if read is not None:
                return *read, seed
        if self.substitute:
            raise UserError(f"no image of {self.folder.root} can be read")
        return None

    def thinned(self, n: int) -> FolderImages:
        """At most n of the images, evenly spaced."""
        chosen = [self.indices[i] for i in evenly_spaced(len(self), n)]
        return FolderImages(self.folder, chosen, self.view, self.side, substitute=self.substitute, scale=self.scale)

    def _read(self, i: int, seed: int, view: View) -> tuple[Tensor, int] | None:
        place = self.indices[i]
        path, label = self.folder.samples[place]
        try:
            check_file(Path(path))
            with opened(path) as picture, torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # `torch.manual_seed` looks for GPUs, which takes long
                return view.pixels(picture), self.folder.outputs[label]
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


def _check_classes(
    folder: Path, spec: ImageSpec, train: Sequence[str], test: Sequence[str], outputs: Sequence[str]
) -> None:
    """UserError unless training and test images have the same classes, and the spec 3 channels and their classes.

    Its classes are `outputs`, where they are known, of which there may be more. Otherwise the numbers must agree.
    """
    if spec.in_channels != 3:
        raise UserError(f"images of {folder} have 3 channels; {spec.name} has {spec.in_channels}")
    apart = {"train": sorted({*train} - {*test}), "val": sorted({*test} - {*train})}
    if train != test:
        only = [f"only {part} has {', '.join(names[:3])}" for part, names in apart.items() if names]
        raise UserError(f"{folder} has {len(train)} training and {len(test)} test classes: {'; '.join(only)}")
    if outputs and len(outputs) != spec.n_classes:
        raise UserError(f"{len(outputs)} names of classes are given; {spec.name} has {spec.n_classes}")
    if len(train) > spec.n_classes or (len(train) < spec.n_classes and not outputs):
        n = f"{len(train)} training and {len(test)} test classes"
        unknown = (
            ", and it is not known which of them these are (search.py --mode ddpg takes their names with --classes)"
        )
        more = "" if len(train) > spec.n_classes else unknown
        raise UserError(f"{folder} has {n}; {spec.name} has {spec.n_classes}{more}")
    if outputs:
        check_among(folder, train, outputs)


def _open(folder: Path, part: str) -> ClassFolders:
    """The images of one part of a folder. UserError where there are none."""
    from dataset.class_folders import ClassFolders  # imports torchvision

    try:
        images = ClassFolders(folder / part)
    except OSError as error:
        raise UserError(f"cannot read {folder / part}: {error.strerror}") from error
    if not len(images):
        raise UserError(f"no images in {folder / part}: it must hold one folder of images a class")
    return images
