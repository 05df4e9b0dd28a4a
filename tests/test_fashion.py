"""Fashion-MNIST: the published files, and what is no such file."""

from __future__ import annotations

import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_spaces import TINY

from apq.errors import UserError
from apq.presets import FASHION
from dataset import fashion, load_splits
from dataset.fashion import CLASSES, DEBIAN, fashion_splits

needs_files = pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"Fashion-MNIST is not in {DEBIAN}: {fashion.REMEDY}")
FEW = {"train": 300, "t10k": 100}


@pytest.fixture
def few(monkeypatch):
    """Small files are whole ones: 240 training, 60 validation and 100 test images."""
    monkeypatch.setattr(fashion, "PARTS", FEW)
    monkeypatch.setattr(fashion, "N_VAL", 60)


def arrays(part, seed=0):
    """Images whose first pixel is their label: (n, 28, 28) and (n,)."""
    n = FEW[part]
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    labels = (np.arange(n) % 10).astype(np.uint8)
    images[:, 0, 0] = labels
    return images, labels


def idx(array):
    """The bytes of an IDX file of bytes: two zeros, type 8, dimensions, sizes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write(folder, *, zipped=True, change=lambda name, data: data):
    folder.mkdir(exist_ok=True)
    for part in FEW:
        for name, array in zip(("images-idx3", "labels-idx1"), arrays(part), strict=True):
            file = f"{part}-{name}-ubyte"
            data = change(file, idx(array))
            (folder / f"{file}.gz").write_bytes(gzip.compress(data)) if zipped else (folder / file).write_bytes(data)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_images_and_labels_of_files(few, tmp_path, zipped):
    splits = load_splits(FASHION, write(tmp_path / "f", zipped=zipped))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [240, 60, 100]
    mean, std = 0.2860, 0.3530  # of all training pixels, as the last test finds them
    for part in (splits.calibration, splits.val, splits.test):
        pixels = (part.images * std + mean) * 255
        assert torch.equal(pixels[:, 0, 0, 0].round().long(), part.labels)
        assert part.images.shape[1:] == (1, 28, 28)
    for part, n in ((splits.calibration, 24), (splits.val, 6), (splits.test, 10)):
        assert torch.bincount(part.labels).tolist() == [n] * 10
    known = torch.cat([splits.calibration.images, splits.val.images]).flatten(1)
    assert len(known.unique(dim=0)) == 300  # no image is in both
    assert splits.source["names"] == list(CLASSES)
    test_images = (torch.from_numpy(arrays("t10k")[0]).float() / 255 - mean) / std
    assert torch.allclose(splits.test.images[:, 0], test_images)


def test_resolution_channels_and_augmentation_of_a_spec(few, tmp_path):
    splits = load_splits(replace(FASHION, resolutions=(32,), in_channels=3), write(tmp_path / "f"))
    torch.manual_seed(0)
    views, labels = splits.train[[0, 1, 2]]
    assert views.shape == (3, 3, 32, 32)
    assert torch.equal(labels, splits.calibration[[0, 1, 2]][1])
    assert not torch.equal(views, splits.calibration[[0, 1, 2]][0])
    torch.manual_seed(0)
    assert torch.equal(views, splits.train[[0, 1, 2]][0])


def test_half_of_the_views_are_mirrored():
    torch.manual_seed(0)
    images = torch.zeros(400, 1, 28, 28)
    images[..., :14] = 1
    left = fashion.distort(images)[..., :14].mean((1, 2, 3)) > 0.5
    assert 160 <= left.sum() <= 240  # five standard deviations are 50


def test_the_folder_is_given_or_in_the_environment_or_debians(few, tmp_path, monkeypatch):
    monkeypatch.setenv("APQ_FASHION", str(write(tmp_path / "f")))
    assert len(load_splits(FASHION).val) == 60
    monkeypatch.setenv("APQ_FASHION", str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=r"not in .*none: apt-get install dataset-fashion-mnist, or .*--data.*APQ_FASHION"
    ):
        load_splits(FASHION)
    monkeypatch.delenv("APQ_FASHION")
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "f")
    assert len(load_splits(FASHION).val) == 60


def test_a_folder_of_class_folders_is_one_of_images(few, tmp_path):
    """Spaces of Fashion-MNIST may be trained on your own images."""
    with pytest.raises(UserError, match="train"):
        load_splits(FASHION, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "is damaged: it is no IDX file of 300 x 28 x 28 bytes"),
        (lambda data: data + b"0", "is damaged"),
        (lambda data: data[:4], "is damaged"),
        (lambda data: data[:1], "is damaged"),
        (lambda data: data[:6], "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: data[:3] + b"\x01" + data[4:], "is damaged"),
        (lambda data: data[:11] + b"\x1b" + data[12:], "is damaged"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_one_line(few, tmp_path, zipped, change, message):
    folder = write(
        tmp_path / "f", zipped=zipped, change=lambda name, data: change(data) if "train-images" in name else data
    )
    with pytest.raises(UserError, match=message) as error:
        fashion_splits(FASHION, folder)
    assert "train-images" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_cut_and_impossible_files(few, tmp_path):
    folder = write(tmp_path / "f")
    file = folder / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"cannot read .*t10k-labels"):
        fashion_splits(FASHION, folder)
    file.write_bytes(gzip.compress(idx(np.full(100, 10, dtype=np.uint8))))
    with pytest.raises(UserError, match="is damaged: it has a label of 10"):
        fashion_splits(FASHION, folder)
    file.unlink()
    with pytest.raises(UserError, match=r"has neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        fashion_splits(FASHION, folder)


def test_a_bomb_is_not_unpacked(few, tmp_path):
    folder = write(tmp_path / "f")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(1 << 28)))
    with pytest.raises(UserError, match="is damaged"):
        fashion_splits(FASHION, folder)


def test_other_numbers_of_classes_are_refused():
    with pytest.raises(UserError, match=r"Fashion-MNIST has 10 classes; .* has 62"):
        fashion_splits(replace(TINY, n_classes=62))


@needs_files
def test_the_published_files():
    """Numbers of its paper, and the first test images, which are an ankle boot, a pullover and two trousers."""
    splits = load_splits(FASHION)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [54_000, 6_000, 10_000]
    assert torch.bincount(splits.test.labels).tolist() == [1_000] * 10
    assert torch.bincount(splits.val.labels).tolist() == [600] * 10
    assert [CLASSES[label] for label in splits.test.labels[:4]] == ["ankle boot", "pullover", "trouser", "trouser"]
    pixels = torch.cat([splits.calibration.images, splits.val.images])
    assert abs(pixels.mean()) < 1e-3
    assert abs(pixels.std() - 1) < 1e-3
