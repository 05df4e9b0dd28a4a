"""Image files of many formats, each read to the colours that it shows: RGB with 8 bits, the right way up."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.Image import Transpose

# Formats of single pictures. Others that Pillow knows are documents, or run programs to be read (EPS).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "QOI")
TURNS = {  # by orientation in EXIF, how to turn the stored picture
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
SIDEWAYS = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
REDUCIBLE = "JPEG"  # the format whose decoder can give fewer pixels in less time
# Tags of TIFF files.
BITS, PHOTOMETRIC = 258, 262
WHITE_IS_ZERO = 0  # a value of PHOTOMETRIC


def image_suffixes() -> frozenset[str]:
    """Endings of names of images, in small letters: those that Pillow registers for `FORMATS`."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)


class Picture:
    """A picture in an open file, RGB, the right way up. Its pixels are decoded when they are asked for.

    See `read_image` for what it shows. The file must be open until then, see `opened`.
    """

    def __init__(self, image: Image.Image) -> None:
        if image.format != REDUCIBLE:  # in other formats the orientation may stand behind the pixels
            image.load()
        in_memory = image.format is None  # as it is shown, whatever its EXIF data once said of a file
        self.image, self.turn = image, None if in_memory else TURNS.get(_orientation(image))
        self.size = image.size if self.turn not in SIDEWAYS else image.size[::-1]  # as it is shown: width, height

    def decoded(self, reduction: int = 1) -> tuple[Image.Image, int]:
        """The pixels, and by how much each side is reduced: at most by `reduction` (1, 2, 4, 8), and in JPEG alone.

        A reduced pixel is what a square of whole ones becomes. In a picture that is turned the squares must fill it, or
        they would be cut off at the other end.
        """
        image, reduced = self.image, 1
        fills = self.turn is None or not any(n % reduction for n in image.size)
        if reduction > 1 and fills and image.format == REDUCIBLE:
            width, height = (max(1, n // reduction) for n in image.size)
            whole, drafted = image.width, image.draft(image.mode, (width, height))
            reduced = 1 if drafted is None else round(whole / drafted[1][2])
        image.load()
        image.info.pop("transparency", None)
        shown = (_scaled(image) if image.mode[0] in "IF" else image).convert("RGB")
        return (shown if self.turn is None else shown.transpose(self.turn)), reduced


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Picture]:
    """Context with the picture in a file. Exceptions of any type come from damaged files, also from `decoded`."""
    Image.init()  # or else `open` does not know the formats
    known = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damage that does not hide the picture
        with Image.open(path, formats=known) as image:
            yield Picture(image)


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file, RGB. Of an animation it is the first frame.

    Grey values of more than 8 bits are scaled by their type: whole numbers from 0 to the largest of their bits, floats
    from 0 to 1. Transparency is dropped, so that stored colours count. The picture is turned as its EXIF data says.

    Exceptions of any type come from damaged files. ValueError for values that have no known scale.
    """
    with opened(path) as picture:
        return picture.decoded()[0]


def _orientation(image: Image.Image) -> object:
    """The orientation in the EXIF data, as it stands there. Damaged data has none: the picture may be whole."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever the parser raises on damaged data
        return None


def _scaled(image: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits, or of floats, in 8 bits."""
    values = np.asarray(image).astype(np.float64) / _largest(image)
    if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow turns values of 8 bits alone
        values = 1 - values
    codes = (values * 255).round()
    if not ((codes >= 0) & (codes <= 255)).all():
        raise ValueError(f"it has values from {values.min():g} to {values.max():g}, where they must be from 0 to 1")
    return Image.fromarray(codes.astype(np.uint8))


def _largest(image: Image.Image) -> int:
    """The value that stands for white."""
    if image.mode == "F":
        return 1
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these hold 16 bits in 32
        raise ValueError("its whole numbers have a sign or 32 bits: nothing says which of them is white")
    return 2 ** (_tag(image, BITS) or 16) - 1


def _tag(image: Image.Image, tag: int) -> int | None:
    """The first value of a tag of a TIFF file; None in other files."""
    value = image.tag_v2.get(tag) if image.format == "TIFF" else None
    return value[0] if isinstance(value, tuple) else value
