"""The work of `test.py --onnx`: the accuracy of an exported file, which tells its images itself."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from apq.cli import table
from apq.errors import UserError
from apq.extras import extra
from dataset import load_splits
from dataset.splits import ImageSpec, make_loader
from elastic_nn.training.engine import evaluate
from export.graph import IMAGE
from export.onnx_file import LOGITS
from export.runners import Runner, onnxruntime
from lut.device_table import Effort, median_ms
from lut.runtimes import onnxruntime_session

IMAGES, CLASSES = "images", "classes"  # the keys of what a file tells about its images
TIMED_S, MOST_RUNS = 0.5, 10_000


@dataclass(frozen=True, kw_only=True)
class FileImages:
    """The images that a file is for: a data set, and the side of those that the network sees. An `ImageSpec`."""

    name: str
    dataset: str
    in_channels: int
    n_classes: int
    resolutions: tuple[int, ...]
    side: int


def images_for(spec: ImageSpec, side: int) -> FileImages:
    """The images of a space or a model, of this side."""
    own = {name: getattr(spec, name) for name in ("name", "dataset", "in_channels", "n_classes", "resolutions")}
    return FileImages(**own, side=side)


class _OfRunner(nn.Module):
    """A runtime as a network, for evaluation."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, images: Tensor) -> Tensor:
        return self.runner(images)


def report_file(file: Path, args: argparse.Namespace) -> None:
    """Measure an ONNX file in onnxruntime on the test images; print its accuracy."""
    images, classes = images_of(file)
    splits = load_splits(images, args.data, outputs=classes)
    loader = make_loader(splits.test, args.batch_size, sides=(images.side,))
    accuracy = evaluate(_OfRunner(onnxruntime(file)), loader, torch.device("cpu"))
    ms = time_of(file, images)
    if args.json:
        print(json.dumps({"file": str(file), **asdict(accuracy), "latency_ms": ms}))
        return
    print(f"{file}: {images.name} in onnxruntime, {accuracy.n_images} test images")
    print(table([("accuracy", "top-1", "top-5"), ("test", f"{accuracy.top1:.2%}", f"{accuracy.top5:.2%}")]))
    print(f"{ms:.4f} ms an image at batch 1, one thread, on this machine")


def time_of(file: Path, images: FileImages) -> float:
    """The median time of an image in onnxruntime in ms, on one thread."""
    session = onnxruntime_session(file.read_bytes(), 1)
    image = np.zeros((1, images.in_channels, images.side, images.side), np.float32)
    return median_ms(lambda: session.run([LOGITS], {IMAGE: image})[0], Effort(seconds=TIMED_S, most=MOST_RUNS))


def images_of(file: Path) -> tuple[FileImages, list[str]]:
    """The images and the classes that an ONNX file tells. UserError for a file that is none, or that export.py has not
    written, or where they do not fit its input and output."""
    onnx = extra("onnx", "export")
    try:
        model = onnx.load(str(file))
    except (OSError, ValueError, extra("google.protobuf.message", "export").DecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        facts, classes = (json.loads(metadata[key]) for key in (IMAGES, CLASSES))
        images = FileImages(**{**facts, "resolutions": tuple(facts["resolutions"])})
        sizes = *images.resolutions, images.side, images.in_channels, images.n_classes
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} does not tell its images: export.py has not written it") from error
    ends = [
        (end.name, [size.dim_value for size in end.type.tensor_type.shape.dim][1:])
        for end in (*model.graph.input, *model.graph.output)
    ]
    told = [(IMAGE, [images.in_channels, images.side, images.side]), (LOGITS, [images.n_classes])]
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    if not whole or ends != told or not isinstance(classes, list) or len(classes) != images.n_classes:
        raise UserError(f"{file} is damaged: the images that it tells do not fit its input and output")
    return images, classes
