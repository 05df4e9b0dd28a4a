"""Rendered characters, harder than digits: 0-9, A-Z and a-z in the fonts of matplotlib, with nothing to download.

The images are made on first use and kept in the cache folder. Part of the difficulty is that some letters differ from
their other case in size alone (c, o, s, x, ...) and some characters hardly differ (0 and O; 1, I and l).
"""

from __future__ import annotations

import hashlib
import json
import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from apq.cache import read_cache, write_cache
from apq.errors import UserError
from apq.files import cache_folder
from dataset.splits import ImageSpec, Splits, TensorImages
from dataset.table import GLYPHS
from dataset.transforms import blur, random_affine, random_strokes

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
# Each font family is in one of the two. matplotlib's other fonts lack letters.
TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("cmr10", "cmb10", "cmti10", "cmmi10", "cmss10", "cmtt10"),
)
TEST_FONTS = (
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
N_IMAGES = {"train": 20_000, "val": 5_000, "test": 10_000}
SPLIT_SEED = 0  # the images are part of the data set, not of an experiment

# The name of the cache file hashes all that determines the images. Raise MAKER when the code below changes them.
MAKER = 1
SIDE, DRAWN_SIDE, FONT_SIZE = 32, 64, 48  # pixels: stored, drawn, height of the drawn font
AFFINE = {"degrees": 15, "shift": 0.1, "scale": 0.15, "shear": 0.2}
INK = (0.45, 0.8)  # least and most contrast of a character
STROKES, STROKE_WIDTH, STROKE_INK = 2, 1.5, 0.45  # clutter: number, pixels, contrast of the strongest
BLUR = (0.3, 1.0)  # standard deviation in pixels
NOISE = (0.04, 0.12)  # standard deviation, in units of the grey range
BLACK = 0.2  # grey of the background, so that noise is not clipped

(MEAN,), (STD,) = GLYPHS.mean, GLYPHS.std
LIGHT_AFFINE = {"degrees": 8, "shift": 0.05, "scale": 0.08, "shear": 0.08}
LIGHT_NOISE = 0.35  # in units of STD: replaces the noise that interpolation smooths away


def distort(images: Tensor) -> Tensor:
    """A slightly different view of each image, drawn from torch's global generator: (N, C, H, W) -> same."""
    views = random_affine(images, **LIGHT_AFFINE)
    return views + LIGHT_NOISE * torch.randn_like(views)


def glyphs_splits(spec: ImageSpec, n_images: dict[str, int] = N_IMAGES) -> Splits:
    """20,000 training, 5,000 validation and 10,000 test images, at the spec's resolution and channels.

    Training and validation images have the same fonts, test images others. Every image is distorted once; training
    images are distorted again, lightly, each time. UserError unless the spec has 62 classes.
    """
    if spec.n_classes != len(CHARACTERS):
        raise UserError(f"glyphs have {len(CHARACTERS)} classes; {spec.name} has {spec.n_classes}")
    arrays = load_glyphs(n_images)
    side = spec.resolutions[-1]
    parts = {}
    for part in N_IMAGES:
        images = (torch.from_numpy(arrays[f"{part}_images"]).float().unsqueeze(1) / 255 - MEAN) / STD
        if side != SIDE:
            images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        parts[part] = images.expand(-1, spec.in_channels, -1, -1), torch.from_numpy(arrays[f"{part}_labels"])
    return Splits(
        train=TensorImages(*parts["train"], distort),
        calibration=TensorImages(*parts["train"]),
        val=TensorImages(*parts["val"]),
        test=TensorImages(*parts["test"]),
        source={"dataset": "glyphs", "version": version(n_images)},
    )


def version(n_images: dict[str, int]) -> str:
    """A hash that identifies the images: of all that determines them."""
    made_by = {
        "maker": [MAKER, SPLIT_SEED, CHARACTERS, TRAIN_FONTS, TEST_FONTS, n_images],
        "drawing": [SIDE, DRAWN_SIDE, FONT_SIZE],
        "look": [AFFINE, INK, STROKES, STROKE_WIDTH, STROKE_INK, BLUR, NOISE, BLACK],
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def cache_file(n_images: dict[str, int] = N_IMAGES) -> Path:
    """The cache file of the images."""
    return cache_folder() / f"glyphs-{version(n_images)}.npz"


def load_glyphs(n_images: dict[str, int] = N_IMAGES) -> dict[str, np.ndarray]:
    """`PART_images` (n, 32, 32) uint8 and `PART_labels` (n,) int64 of each part, from the cache or newly made."""
    file = cache_file(n_images)
    arrays = _read_cache(file, n_images)
    if arrays is None:
        arrays = make_glyphs(n_images)
        write_cache(file, arrays)
    return arrays


def make_glyphs(n_images: dict[str, int]) -> dict[str, np.ndarray]:
    """Make all images. The state of torch's global generator does not change."""
    arrays = {}
    drawn = {"train": draw(TRAIN_FONTS), "test": draw(TEST_FONTS)}
    drawn["val"] = drawn["train"]
    with torch.random.fork_rng(devices=[]):
        for index, part in enumerate(N_IMAGES):
            torch.manual_seed(1000 * SPLIT_SEED + index)
            fonts, n = len(drawn[part]), n_images[part]
            order = torch.randperm(n)  # every class and font is equally frequent
            labels, font = order % len(CHARACTERS), order // len(CHARACTERS) % fonts
            images = [
                photograph(drawn[part][f, c])
                for f, c in zip(font.split(1000), labels.split(1000), strict=True)  # in batches, to bound memory
            ]
            arrays[f"{part}_images"] = torch.cat(images).squeeze(1).numpy()
            arrays[f"{part}_labels"] = labels.numpy()
    return arrays


def draw(fonts: tuple[str, ...]) -> Tensor:
    """Every character in every font, white on black, at the font's own height: (fonts, 62, 64, 64) uint8."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    drawn = np.zeros((len(fonts), len(CHARACTERS), DRAWN_SIDE, DRAWN_SIDE), dtype=np.uint8)
    for i, name in enumerate(fonts):
        # The basic layout engine is always there; the other one needs a system library.
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for j, character in enumerate(CHARACTERS):
            image = Image.new("L", (DRAWN_SIDE, DRAWN_SIDE))
            centre = (DRAWN_SIDE / 2, DRAWN_SIDE / 2)
            ImageDraw.Draw(image).text(centre, character, fill=255, font=font, anchor="mm")
            drawn[i, j] = np.asarray(image)
    return torch.from_numpy(drawn)


def photograph(drawn: Tensor) -> Tensor:
    """A random photograph of poor quality of each character: (N, 64, 64) uint8 -> (N, 1, 32, 32) uint8."""
    n = len(drawn)
    views = random_affine(drawn.unsqueeze(1).float() / 255, **AFFINE)
    ink = F.avg_pool2d(views, DRAWN_SIDE // SIDE) * _uniform(INK, n).view(n, 1, 1, 1)
    clutter = STROKE_INK * random_strokes(n, STROKES, SIDE, width=STROKE_WIDTH)
    images = BLACK + blur(torch.maximum(ink, clutter), _uniform(BLUR, n))
    images = images + _uniform(NOISE, n).view(n, 1, 1, 1) * torch.randn_like(images)
    return (255 * images).round().clamp(0, 255).to(torch.uint8)


def _uniform(ends: tuple[float, float], n: int) -> Tensor:
    low, high = ends
    return low + (high - low) * torch.rand(n)


def _read_cache(file: Path, n_images: dict[str, int]) -> dict[str, np.ndarray] | None:
    images = {f"{part}_images": ((n, SIDE, SIDE), "uint8") for part, n in n_images.items()}
    labels = {f"{part}_labels": ((n,), "int64") for part, n in n_images.items()}
    arrays = read_cache(file, images | labels)
    if arrays is None or any(not 0 <= label < len(CHARACTERS) for name in labels for label in np.unique(arrays[name])):
        return None
    return arrays
