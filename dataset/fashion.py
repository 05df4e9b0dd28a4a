"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 70,000 photographs of clothes, 28x28 pixels, ten classes; MIT licence.

The four IDX files, gzipped or not, are read from --data DIR, from the folder in APQ_FASHION, or from where Debian's
package `dataset-fashion-mnist` puts them.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apq.errors import UserError, one_line
from dataset.splits import ImageSpec, Splits, TensorImages
from dataset.table import FASHION
from dataset.transforms import random_affine

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
REMEDY = "apt-get install dataset-fashion-mnist, or give their folder with --data or APQ_FASHION"
SIDE = 28
N_TRAIN, N_VAL, N_TEST = 54_000, 6_000, 10_000
SPLIT_SEED = 0  # the split is part of the data set, not of an experiment
IMAGES, LABELS = 0x00000803, 0x00000801  # magic numbers: bytes in three dimensions, in one
HEADER = {IMAGES: 16, LABELS: 8}  # bytes
PARTS = {"train": N_TRAIN + N_VAL, "t10k": N_TEST}
(MEAN,), (STD,) = FASHION.mean, FASHION.std
AFFINE = {"degrees": 5, "shift": 0.05, "scale": 0.08, "shear": 0.08}


def distort(images: Tensor) -> Tensor:
    """A slightly different view of each image, half of them mirrored: (N, C, H, W) -> same.

    Random numbers come from torch's global generator.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return random_affine(torch.where(mirrored, images.flip(3), images), **AFFINE)


def fashion_splits(spec: ImageSpec, folder: Path | None = None) -> Splits:
    """54,000 training, 6,000 validation and 10,000 test images, at the spec's resolution and channels.

    A tenth of the published training images is held out, the same number of each class. Training images are distorted
    anew each time. UserError where the files are not there or damaged, and unless the spec has 10 classes.
    """
    if spec.n_classes != len(CLASSES):
        raise UserError(f"Fashion-MNIST has {len(CLASSES)} classes; {spec.name} has {spec.n_classes}")
    folder = fashion_folder(folder)
    (images, labels), (test_images, test_labels) = (load_part(folder, part) for part in PARTS)
    rng, each = np.random.default_rng(SPLIT_SEED), N_VAL // len(CLASSES)
    val = np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in range(len(CLASSES))]))
    train = np.setdiff1d(np.arange(len(labels)), val)

    def tensors(pixels: np.ndarray, classes: np.ndarray) -> tuple[Tensor, Tensor]:
        scaled = (torch.tensor(pixels).float().unsqueeze(1) / 255 - MEAN) / STD
        if (side := spec.resolutions[-1]) != SIDE:
            scaled = F.interpolate(scaled, size=(side, side), mode="bilinear", align_corners=False)
        return scaled.expand(-1, spec.in_channels, -1, -1), torch.from_numpy(classes.astype(np.int64))

    return Splits(
        train=TensorImages(*tensors(images[train], labels[train]), distort),
        calibration=TensorImages(*tensors(images[train], labels[train])),
        val=TensorImages(*tensors(images[val], labels[val])),
        test=TensorImages(*tensors(test_images, test_labels)),
        source={"dataset": "fashion", "version": version(images, labels), "names": list(CLASSES)},
    )


def fashion_folder(given: Path | None = None) -> Path:
    """The folder of the files: the given one, that of APQ_FASHION, or Debian's. UserError where it is not there."""
    folder = given or Path(os.environ.get("APQ_FASHION") or DEBIAN)
    if not folder.is_dir():
        raise UserError(f"Fashion-MNIST is not in {folder}: {REMEDY}")
    return folder


def load_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) of "train" or "t10k", uint8. UserError for what is damaged."""
    n = PARTS[part]
    images = _read(folder, f"{part}-images-idx3-ubyte", IMAGES, (n, SIDE, SIDE))
    labels = _read(folder, f"{part}-labels-idx1-ubyte", LABELS, (n,))
    if labels.max() >= len(CLASSES):
        raise UserError(f"{folder}/{part}-labels-idx1-ubyte is damaged: it has a label of {labels.max()}")
    return images, labels


def version(images: np.ndarray, labels: np.ndarray) -> str:
    """A hash that identifies the training images."""
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]


def _read(folder: Path, name: str, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """The array of an IDX file, gzipped or not, of which all sizes are known before it is read."""
    size = HEADER[magic] + int(np.prod(shape))
    file = next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)
    if file is None:
        raise UserError(f"{folder} has neither {name} nor {name}.gz: {REMEDY}")
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            data = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error
    expected = np.array((magic, *shape), dtype=">u4").tobytes()
    if len(data) != size or data[: HEADER[magic]] != expected:
        raise UserError(f"{file} is damaged: it is no IDX file of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(data, dtype=np.uint8, offset=HEADER[magic]).reshape(shape)
