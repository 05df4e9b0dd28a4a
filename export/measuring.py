"""The work of `test.py --onnx`: the accuracy of an exported file, which tells its images itself."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apq.cli import table
from apq.errors import UserError
from apq.extras import extra
from dataset import load_splits
from dataset.splits import ImageSpec, make_loader
from elastic_nn.training.engine import evaluate
from export.runtimes import Runner, onnxruntime

IMAGES = "images"  # the key of what a file tells about its images


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
    metadata = metadata_of(file)
    images, classes = images_of(file, metadata), json.loads(metadata.get("classes", "[]"))
    splits = load_splits(images, args.data, outputs=classes)
    loader = make_loader(splits.test, args.batch_size, sides=(images.side,))
    accuracy = evaluate(_OfRunner(onnxruntime(file)), loader, torch.device("cpu"))
    if args.json:
        print(json.dumps({"file": str(file), **asdict(accuracy)}))
        return
    print(f"{file}: {images.name} in onnxruntime, {accuracy.n_images} test images")
    print(table([("accuracy", "top-1", "top-5"), ("test", f"{accuracy.top1:.2%}", f"{accuracy.top5:.2%}")]))


def metadata_of(file: Path) -> dict[str, str]:
    """What an ONNX file tells about its network. UserError for a file that is none."""
    onnx = extra("onnx", "export")
    try:
        model = onnx.load(str(file))
    except (OSError, ValueError, extra("google.protobuf.message", "export").DecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    return {entry.key: entry.value for entry in model.metadata_props}


def images_of(file: Path, metadata: Mapping[str, str]) -> FileImages:
    """The images of a file. UserError where it does not tell them."""
    try:
        facts = json.loads(metadata[IMAGES])
        return FileImages(**{**facts, "resolutions": tuple(facts["resolutions"])})
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} does not tell its images: export.py has not written it") from error
