"""What decoding JPEG files at a part of their size changes: pixels of photographs, and answers of a network.

Photographs are the two that scikit-learn brings, 640 x 427 pixels. Each is read whole and reduced, and shown with 1 to
4 times fewer pixels a side than the reduced one has: `dataset.crops.MARGIN` is the least at which the loader reduces.
Differences are in codes of 255. The network is the shipped MobileNetV2 of glyphs, on test images of glyphs that are
enlarged to JPEG files of `SIDE` pixels and read back at 32 both ways.
"""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import sklearn.datasets
import torch
from PIL import Image

from apq.cli import Parser, at_least, run
from benchmarks.machine import describe
from benchmarks.markdown import markdown
from dataset import load_splits
from dataset.crops import MARGIN
from dataset.image_file import Picture
from dataset.table import GLYPHS
from elastic_nn.networks.model_file import load_model

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"
MARGINS = (1.0, 1.5, 2.0, MARGIN, 4.0)
MODEL = Path("models/mobilenet_v2_small/model.pt")
SIDE, QUALITY = 256, 90


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--images", type=at_least(1), default=1000, help="glyphs to ask the network about")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    print(describe(), "\n")
    photos = [path.read_bytes() for path in sorted(PHOTOS.glob("*.jpg"))]
    rows = [differences(photos, factor, margin) for factor in (2, 4) for margin in MARGINS]
    print(markdown(("reduced by", "pixels left for each shown", "mean", "99 % below", "most"), rows), "\n")
    large = jpeg(Image.open(PHOTOS / "china.jpg").resize((4000, 2669), Image.Resampling.BICUBIC))
    rows = [(factor, f"{1e3 * seconds(large, factor):.0f}") for factor in (1, 2, 4)]
    print(markdown(("4000 x 2669 pixels, reduced by", "ms to decode and resize to 384 x 256"), rows), "\n")
    print(markdown(("glyphs at 32 pixels", "top-1"), answers(args.images)))


def decoded(file: bytes, factor: int, size: tuple[int, int]) -> np.ndarray:
    """The whole picture at a size, reduced by a factor when it is decoded."""
    with Image.open(io.BytesIO(file)) as image:
        width, height = image.size
        reduced, by = Picture(image).decoded(factor)
    box = (0, 0, width / by, height / by)
    return np.asarray(reduced.resize(size, Image.Resampling.BILINEAR, box=box)).astype(np.int16)


def differences(files: list[bytes], factor: int, margin: float) -> tuple[str, ...]:
    """A row: differences of photographs that are read whole and reduced."""
    found = []
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            size = tuple(int(n / factor / margin) for n in image.size)
        found.append(np.abs(decoded(file, 1, size) - decoded(file, factor, size)).ravel())
    all_of = np.concatenate(found)
    return f"{factor}", f"{margin}", f"{all_of.mean():.2f}", f"{np.percentile(all_of, 99):.0f}", f"{all_of.max()}"


def seconds(file: bytes, factor: int) -> float:
    """The least time of computing to read a file at 384 x 256 pixels, of five."""
    times = []
    for _ in range(5):
        started = time.process_time()
        decoded(file, factor, (384, 256))
        times.append(time.process_time() - started)
    return min(times)


def jpeg(image: Image.Image) -> bytes:
    """The file of an image."""
    image.save(file := io.BytesIO(), "JPEG", quality=QUALITY)
    return file.getvalue()


@torch.inference_mode()
def answers(n: int) -> list[tuple[str, str]]:
    """Rows: top-1 on glyphs from files that are read whole and reduced, and how often both answers agree."""
    net, spec = load_model(MODEL)[:2]
    test = load_splits(spec).test.thinned(n)
    pixels = (test.images * GLYPHS.std[0] + GLYPHS.mean[0]).mul(255).round().clamp(0, 255).byte()
    files = [
        jpeg(Image.fromarray(one[0].numpy()).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for one in pixels
    ]
    factor = 2 ** int(math.log2(SIDE / spec.resolution / MARGIN))
    found = {}
    for by in (1, factor):
        read = torch.stack([torch.from_numpy(decoded(file, by, (spec.resolution,) * 2)[:, :, 0]) for file in files])
        images = (read[:, None].float() / 255 - GLYPHS.mean[0]) / GLYPHS.std[0]
        found[by] = torch.cat([net.eval()(part).argmax(1) for part in images.split(256)])
    right = [(f"reduced by {by}", f"{(found[by] == test.labels).float().mean():.2%}") for by in found]
    return [*right, ("same answer", f"{(found[1] == found[factor]).float().mean():.2%} of {len(files)}")]


if __name__ == "__main__":
    run(main)
