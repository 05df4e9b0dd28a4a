"""Image files: every format gives the colours that it shows, and what is no image is left out and counted."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_dataset import make_folder

from apq.errors import UserError
from apq.presets import DIGITS
from dataset import load_splits
from dataset.image_file import FORMATS, image_suffixes, read_image
from dataset.imagenet import image_folder_space, report_unreadable
from dataset.splits import make_loader

GREY16 = np.array([[0, 1, 128, 129], [255, 256, 257, 32768], [40000, 65278, 65406, 65535]], dtype=np.uint16)
GREY8 = np.array([[0, 0, 0, 1], [1, 1, 1, 128], [156, 254, 254, 255]], dtype=np.uint8)  # value / 257, rounded
COLOURS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.uint8)[:, :, None], 3, axis=2)


def write_tiff(path, values, bits, sample_format=1, white_is_zero=False, order="<"):
    """A grey TIFF file in one strip, as the specification has it. `values` are bytes, packed."""
    height, width = values.shape[:2]
    data = values.tobytes()
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    entries += [(273, 8), (277, 1), (278, height), (279, len(data)), (339, sample_format)]
    tags = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(entries)) + tags + struct.pack(f"{order}I", 0))


def packed_12_bits(values):
    high, low = values.reshape(len(values), -1, 2).transpose(2, 0, 1).astype(np.uint32)
    both = (high << 12) | low
    return np.stack([both >> 16, (both >> 8) & 255, both & 255], axis=2).astype(np.uint8)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bits_are_scaled_by_257(tmp_path, name):
    Image.fromarray(GREY16).save(tmp_path / name)
    assert (pixels(tmp_path / name) == grey(GREY8)).all()


def test_deep_tiff_files(tmp_path):
    """Byte orders, 12 bits, white as zero, floats; by hand, since Pillow writes few of them."""
    file = tmp_path / "x.tif"
    for order in "<>":
        write_tiff(file, GREY16.astype(f"{order}u2"), 16, order=order)
        assert (pixels(file) == grey(GREY8)).all()
    write_tiff(file, GREY16, 16, white_is_zero=True)
    assert (pixels(file) == grey(255 - GREY8)).all()
    write_tiff(file, GREY8, 8, white_is_zero=True)
    assert (pixels(file) == grey(255 - GREY8)).all()
    values = np.array([[0, 8, 9, 4095], [2048, 16, 4079, 1000]])  # 4095 / 255 = 16.06
    packed = packed_12_bits(values)
    write_tiff(file, packed.reshape(2, -1), 12)
    file.write_bytes(file.read_bytes().replace(struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4)))
    assert (pixels(file) == grey([[0, 0, 1, 255], [128, 1, 254, 62]])).all()
    for order in "<>":
        floats = np.array([[0, 0.25, 1], [0.001, 0.002, 0.5]], dtype=f"{order}f4")
        write_tiff(file, floats, 32, sample_format=3, order=order)
        assert (pixels(file) == grey([[0, 64, 255], [0, 1, 128]])).all()


def test_values_without_a_known_scale_are_refused(tmp_path):
    file = tmp_path / "x.tif"
    for bad in (-0.1, 1.1, 255.0, np.nan, np.inf):
        Image.fromarray(np.array([[0, bad]], dtype=np.float32)).save(file)
        with pytest.raises(ValueError, match="values from"):
            read_image(file)
    for kind, bits, sample_format in (("<i2", 16, 2), ("<i4", 32, 2), ("<u4", 32, 1)):
        write_tiff(file, np.array([[0, 1000]], dtype=kind), bits, sample_format)
        with pytest.raises(ValueError, match="sign or 32 bits"):
            read_image(file)


def test_modes_of_8_bits_and_less(tmp_path):
    file = tmp_path / "x.png"
    Image.fromarray(np.array([[True, False]])).save(file)
    assert pixels(file).tolist() == [[[255] * 3, [0] * 3]]
    Image.fromarray(np.array([[[9, 0], [200, 128]]], dtype=np.uint8), "LA").save(file)
    assert pixels(file).tolist() == [[[9] * 3, [200] * 3]]
    Image.fromarray(np.array([[[9, 8, 7, 0], [1, 2, 3, 128]]], dtype=np.uint8)).save(file)
    assert pixels(file).tolist() == [[[9, 8, 7], [1, 2, 3]]]  # stored colours, as torchvision reads them
    indexed = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    indexed.putpalette([250, 0, 0, 0, 100, 0, 1, 2, 3])
    for how in ({}, {"transparency": 1}, {"transparency": bytes([255, 128, 0])}):
        indexed.save(file, **how)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pixels(file).tolist() == [[[250, 0, 0], [0, 100, 0], [1, 2, 3]]]
    for bits in (2, 4):
        levels = Image.fromarray(np.arange(2**bits, dtype=np.uint8)[None], "P")
        levels.putpalette([c for value in range(2**bits) for c in [value * 255 // (2**bits - 1)] * 3])
        levels.save(file, bits=bits)
        assert pixels(file)[0, :, 0].tolist() == [value * 255 // (2**bits - 1) for value in range(2**bits)]
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [10, 100, 200, 50]]], dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "x.tif")
    light = 255.0 - inks.astype(np.float64)
    np.testing.assert_allclose(pixels(tmp_path / "x.tif"), light[..., :3] * light[..., 3:] / 255, atol=0.51)
    deep = np.full((16, 16, 4), [0, 128, 255, 0], dtype=np.uint8)
    Image.fromarray(deep, "CMYK").save(tmp_path / "x.jpg", quality=100)  # Adobe's: its inks are stored inverted
    np.testing.assert_allclose(pixels(tmp_path / "x.jpg"), np.broadcast_to([255, 127, 0], (16, 16, 3)), atol=3)


def test_colours_of_16_bits_are_right_to_one_code(tmp_path):
    """Pillow keeps their high byte."""
    values = np.stack([GREY16, GREY16[::-1], GREY16[:, ::-1]], axis=2)
    header = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert np.abs(pixels(tmp_path / "x.png") - values / 257).max() < 1


TURNED = {  # what is seen, by orientation: TIFF 6.0, tag 274
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: np.rot90(COLOURS, -1),
    7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(COLOURS),
}
LOSSLESS = {"png": {}, "webp": {"lossless": True}, "tiff": {}, "tif": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("orientation", [*TURNED, 0, 9])
def test_pictures_are_turned_the_right_way_up(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    for ending, how in LOSSLESS.items() if orientation in TURNED else (("png", {}), ("webp", {"lossless": True})):
        Image.fromarray(COLOURS).save(tmp_path / f"x.{ending}", exif=exif.tobytes(), **how)
        np.testing.assert_array_equal(pixels(tmp_path / f"x.{ending}"), TURNED.get(orientation, COLOURS))
    big = Image.fromarray(np.kron(COLOURS, np.ones((16, 16, 1), dtype=np.uint8)))
    big.save(tmp_path / "x.jpg", exif=exif.tobytes(), quality=100)
    expected = np.kron(TURNED.get(orientation, COLOURS), np.ones((16, 16, 1), dtype=np.uint8))
    assert np.abs(pixels(tmp_path / "x.jpg").astype(int) - expected).mean() < 3
    Image.fromarray(COLOURS[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "x.png", exif=exif.tobytes())
    np.testing.assert_array_equal(pixels(tmp_path / "x.png")[:, :, 0], TURNED.get(orientation, COLOURS)[:, :, 0])


def test_damaged_exif_data_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 6
    good = exif.tobytes()
    for _ in range(200):
        bad = bytearray(good)
        for place in rng.integers(6, len(bad), 3):
            bad[place] = rng.integers(256)
        Image.fromarray(COLOURS).save(tmp_path / "x.png", exif=bytes(bad))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert sorted(pixels(tmp_path / "x.png").shape) == [3, 4, 6]


def test_animations_are_their_first_frame(tmp_path):
    frames = [Image.fromarray(grey(np.full((4, 5), value))) for value in (30, 200)]
    for ending, how in (("gif", {}), ("png", {}), ("webp", {"lossless": True}), ("tif", {})):
        frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **how)
        assert (pixels(tmp_path / f"x.{ending}") == 30).all()


@pytest.mark.parametrize("name", FORMATS)
def test_no_truncated_file_is_half_an_image(tmp_path, name):
    """Whatever is cut off, the file is refused, or all of its pixels are right."""
    rng = np.random.default_rng(0)
    noise, whole = Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)), io.BytesIO()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {name}")
    noise.save(whole, name)
    (tmp_path / "x").write_bytes(whole.getvalue())
    right = pixels(tmp_path / "x")
    refused = 0
    for share in (0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        (tmp_path / "x").write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
        try:
            assert (pixels(tmp_path / "x") == right).all()
        except AssertionError:
            raise
        except Exception:
            refused += 1
    assert refused == 9


def test_formats_that_run_programs_are_not_opened(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(OSError, match="cannot identify"):
        read_image(tmp_path / "x.jpg")


def test_what_is_ignored_is_counted_in_one_line(tmp_path, capfd):
    folder = make_folder(tmp_path / "mixed", train=6)
    train = folder / "train"
    for name in ("a.jfif", "b.JPE", "c.gif", "d.TIFF", "deep/e.avif.png"):
        path = train / "class0" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(COLOURS).save(path, "PNG")
    for name in (".ipynb_checkpoints/0.jpg", "class1/.ipynb_checkpoints/0-checkpoint.jpg", "class1/._0.jpg"):
        (train / name).parent.mkdir(exist_ok=True)
        Image.fromarray(COLOURS).save(train / name)
    for name in ("class2/a.heic", "class2/b.heic", "class2/labels.txt", "class2/README", "loose.jpg", ".DS_Store"):
        (train / name).write_bytes(b"x")
    space = image_folder_space(replace(DIGITS, resolutions=(32,)), folder)
    assert space.n_classes == 3
    splits = load_splits(space, folder)
    assert len(splits.train) + len(splits.val) == 18 + 5
    lines = [line for line in capfd.readouterr().err.splitlines() if "ignored" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"ignored in {train}: 4 hidden, 2 .heic, ")
    assert all(part in lines[0] for part in ("1 .txt", "1 without an ending", "1 outside of class folders"))
    assert sum(len(labels) for _, labels in make_loader(splits.train, 8)) == len(splits.train)
    report_unreadable(splits)
    assert not capfd.readouterr().err  # all of them can be read


def test_ordinary_folders_are_told_nothing_of(tmp_path, capfd):
    folder = make_folder(tmp_path / "plain")
    load_splits(image_folder_space(replace(DIGITS, resolutions=(32,)), folder), folder)
    assert not capfd.readouterr().err
    assert {".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm"} <= image_suffixes()


def test_each_broken_file_is_told_once(tmp_path, capfd):
    folder = make_folder(tmp_path / "torn", train=10)
    (folder / "train/class0/0.jpg").write_bytes(b"x")
    splits = load_splits(image_folder_space(replace(DIGITS, resolutions=(32,)), folder), folder)
    for part in (splits.train, splits.calibration, splits.val, splits.train.thinned(20)):
        for _ in make_loader(part, 4):
            pass
    assert capfd.readouterr().err.count(f"skipping {folder / 'train/class0/0.jpg'}") == 1
    report_unreadable(splits)
    assert capfd.readouterr().err.count("1 of") == 1


def test_mistakes_say_what_is_wrong(tmp_path):
    space = replace(DIGITS, resolutions=(32,))
    with pytest.raises(UserError, match=r"no images in .*nope/train"):  # not that its images have 3 channels
        load_splits(space, tmp_path / "nope")
    folder = make_folder(tmp_path / "apart")
    (folder / "val/class1").rename(folder / "val/other")
    with pytest.raises(UserError, match="only train has class1; only val has other"):
        load_splits(image_folder_space(space, folder), folder)
    with pytest.raises(UserError, match="3 channels"):
        load_splits(space, folder)


def test_names_need_not_be_text(tmp_path):
    folder = make_folder(tmp_path / "bytes")
    image = folder / "train/class0/0.jpg"
    image.rename(image.with_name("caf\udce9.jpg"))
    splits = load_splits(image_folder_space(replace(DIGITS, resolutions=(32,)), folder), folder)
    assert len(splits.source["files"]) == 64
