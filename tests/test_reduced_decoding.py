"""JPEG files that are decoded at a part of their size: when, and that it shows the same picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.crops import central_crop, random_crop, reduction
from dataset.image_file import Picture, opened, read_image

PHOTO = Path(sklearn.datasets.__file__).parent / "images/china.jpg"  # 640 x 427 pixels, full of edges
CODES = 6  # of 255 that any pixel of a reduced photograph may be away from that of the whole one
DECODED = Picture.decoded


@pytest.fixture
def factors(monkeypatch):
    """By how much pictures were reduced, in order."""
    found = []

    def decoded(picture, reduction=1):
        image, reduced = DECODED(picture, reduction)
        found.append(reduced)
        return image, reduced

    monkeypatch.setattr(Picture, "decoded", decoded)
    return found


def write(path, orientation=1, size=(1280, 848)):
    exif = Image.Exif()
    exif[274] = orientation
    Image.open(PHOTO).resize(size, Image.Resampling.BICUBIC).save(path, quality=95, exif=exif.tobytes())
    return path


def both_ways(path, view, seed=0):
    """The pixels of a view of a file as a loader reads it, and of the same picture from memory, whole."""
    pixels = []
    for from_file in (True, False):
        torch.manual_seed(seed)
        with opened(path) as picture:
            pixels.append(view.pixels(picture if from_file else Picture(read_image(path))).int())
    return pixels


@given(
    shown=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
)
def test_what_is_left_is_three_times_what_is_shown(shown, size):
    factor = reduction(shown, size)
    assert factor in (1, 2, 4, 8)
    least = [n / wanted for n, wanted in zip(shown, size, strict=True)]
    assert factor == 1 or min(least) / factor >= 3
    assert factor == 8 or min(least) / (2 * factor) < 3  # and no more than that


def test_images_of_imagenets_size_are_decoded_whole(tmp_path, factors):
    file = write(tmp_path / "x.jpg", size=(500, 375))
    for side in (128, 224):
        for view, seeds in ((central_crop(side), 1), (random_crop(side), 10)):
            for seed in range(seeds):
                one, other = both_ways(file, view, seed)
                assert torch.equal(one, other)
    assert set(factors) == {1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_photograph_is_the_same_picture(tmp_path, factors, orientation):
    """Of every orientation: a picture that is turned the wrong way, or moved by a pixel, differs much more."""
    file = write(tmp_path / "x.jpg", orientation)
    one, other = both_ways(file, central_crop(112))
    assert factors[0] == 2
    assert (one - other).abs().max() <= CODES
    assert (one - other).abs().float().mean() < 0.5
    assert (one.roll(1, 2) - other).abs().float().mean() > 5
    one, other = both_ways(file, central_crop(32))
    assert factors[3] == 4
    assert (one - other).abs().max() <= CODES


def test_sides_that_no_factor_divides(tmp_path, factors):
    """The last pixel of a reduced row stands for less than a whole square. A turned picture is decoded whole then."""
    for orientation, expected in ((1, 2), (3, 1), (6, 1)):
        file = write(tmp_path / "x.jpg", orientation, size=(1281, 849))
        factors.clear()
        one, other = both_ways(file, central_crop(112))
        assert factors[0] == expected
        assert (one - other).abs().max() <= CODES


@settings(max_examples=25)
@given(seed=st.integers(0, 2**62))
def test_random_crops_of_reduced_photographs(tmp_path_factory, seed):
    file = tmp_path_factory.getbasetemp() / "crops.jpg"
    if not file.exists():
        write(file)
    one, other = both_ways(file, random_crop(48), seed)
    assert (one - other).abs().float().mean() < 1.5
    assert (one - other).abs().max() <= 3 * CODES  # at the borders of a crop, whole pixels are cut off


def test_other_formats_are_decoded_whole(tmp_path, factors):
    Image.open(PHOTO).save(tmp_path / "x.png")
    one, other = both_ways(tmp_path / "x.png", central_crop(16))
    assert factors == [1, 1, 1]
    assert torch.equal(one, other)


def test_grey_and_cmyk_pictures(tmp_path, factors):
    for mode in ("L", "CMYK"):
        Image.open(PHOTO).convert(mode).save(tmp_path / "x.jpg", quality=95)
        factors.clear()
        one, other = both_ways(tmp_path / "x.jpg", central_crop(48))
        assert factors[0] == 2
        assert (one - other).abs().max() <= 2 * CODES


def test_no_truncated_file_is_half_a_picture(tmp_path):
    whole = write(tmp_path / "x.jpg").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        (tmp_path / "cut.jpg").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(OSError, match="truncated"), opened(tmp_path / "cut.jpg") as picture:
            central_crop(32).pixels(picture)


def test_a_reduced_picture_is_that_of_its_squares(tmp_path):
    """A reduced pixel stands where the square of whole pixels stood that it was made of."""
    ramp = np.broadcast_to(np.linspace(10, 240, 640)[None, :, None], (320, 640, 3)).round().astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "x.jpg", quality=100)
    for factor in (2, 4, 8):
        with opened(tmp_path / "x.jpg") as picture:
            image, reduced = picture.decoded(factor)
        assert (reduced, image.size) == (factor, (640 // factor, 320 // factor))
        means = ramp.reshape(320 // factor, factor, 640 // factor, factor, 3).mean((1, 3))
        assert np.abs(np.asarray(image) - means).max() <= 2
