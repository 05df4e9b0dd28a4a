"""Glyphs: drawing, cache, splits; on a few hundred images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from apq.errors import UserError
from apq.files import cache_folder
from apq.presets import DIGITS, GLYPHS
from dataset import glyphs, load_splits
from dataset.splits import make_loader
from dataset.transforms import blur, random_strokes

FEW = {"train": 620, "val": 186, "test": 124}


@pytest.fixture(scope="module")
def made():
    return glyphs.make_glyphs(FEW)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("APQ_CACHE", str(tmp_path))
    return tmp_path


def test_the_same_images_come_again(made):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = glyphs.make_glyphs(FEW)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.keys() == made.keys()
    assert all(np.array_equal(again[name], made[name]) for name in made)
    assert len({made[f"{part}_images"][:3].tobytes() for part in FEW}) == 3


def test_images_fill_the_grey_range_and_every_class_evenly(made):
    for part, n in FEW.items():
        images, labels = made[f"{part}_images"], made[f"{part}_labels"]
        assert (images.shape, images.dtype, labels.shape) == ((n, 32, 32), np.uint8, (n,))
        assert set(np.bincount(labels, minlength=62)) == {n // 62}
        assert images.min() < 20
        assert images.max() > 200
        assert len(set(labels[:62])) > 25  # not in order


def test_fonts_are_apart_by_family_and_have_every_character():
    def family(font):
        return "cm" if font.startswith("cm") else font.split("-")[0].removesuffix("BolIta").removesuffix("Bol")

    train = {family(font).removesuffix("Italic") for font in glyphs.TRAIN_FONTS}
    test = {family(font).removesuffix("Italic") for font in glyphs.TEST_FONTS}
    assert train == {"DejaVuSans", "DejaVuSansMono", "cm"}
    assert test == {"DejaVuSerif", "STIXGeneral"}
    fonts = glyphs.TRAIN_FONTS + glyphs.TEST_FONTS
    drawn = glyphs.draw(fonts)
    assert drawn.shape == (len(set(fonts)), 62, 64, 64)
    assert len(np.unique(drawn.flatten(0, 1).flatten(1).numpy(), axis=0)) == len(fonts) * 62  # no "missing" boxes
    edge = torch.cat([drawn[..., 0, :], drawn[..., -1, :], drawn[..., 0], drawn[..., -1]])
    assert (edge == 0).all()  # nothing is cut off


def test_images_are_made_once_and_damage_is_mended(cache, monkeypatch):
    first = glyphs.load_glyphs(FEW)
    file = glyphs.cache_file(FEW)
    assert [path.name for path in cache.iterdir()] == [file.name]

    def never(n_images):
        raise AssertionError("made although the cache has them")

    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "make_glyphs", never)
        again = glyphs.load_glyphs(FEW)
    assert all(np.array_equal(again[name], first[name]) for name in first)
    whole = file.read_bytes()
    cut = {name: array[1:] for name, array in first.items()}
    for damage in (b"", whole[: len(whole) // 2], b"nonsense", cut):
        if isinstance(damage, bytes):
            file.write_bytes(damage)
        else:
            np.savez(file, **damage)
        mended = glyphs.load_glyphs(FEW)
        assert all(np.array_equal(mended[name], first[name]) for name in first)
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_loss(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("APQ_CACHE", str(tmp_path / "file"))
    assert len(glyphs.load_glyphs({"train": 62, "val": 1, "test": 1})["train_images"]) == 62


def test_other_settings_have_another_cache(monkeypatch):
    names = {glyphs.cache_file(), glyphs.cache_file(FEW)}
    assert all(name.parent == cache_folder() for name in names)
    monkeypatch.setattr(glyphs, "NOISE", (0.5, 0.6))
    assert len(names | {glyphs.cache_file(FEW)}) == 3


def test_splits_follow_the_space(made, cache):
    space = replace(GLYPHS, in_channels=3, resolutions=(40,))
    splits = glyphs.glyphs_splits(space, FEW)
    assert [len(part) for part in (splits.train, splits.calibration, splits.val, splits.test)] == [620, 620, 186, 124]
    images, labels = next(iter(make_loader(splits.train, 8)))
    assert (images.shape, labels.shape) == ((8, 3, 40, 40), (8,))
    assert splits.source == {"dataset": "glyphs", "version": glyphs.version(FEW)}
    plain = glyphs.glyphs_splits(GLYPHS, FEW)
    assert np.array_equal(plain.val.labels, made["val_labels"])
    assert not torch.equal(plain.train[[0, 1]][0], plain.train[[0, 1]][0])  # anew at each look
    for part in (plain.calibration, plain.val, plain.test):
        assert torch.equal(part[[0, 1]][0], part[[0, 1]][0])
    assert abs(plain.calibration.images.mean()) < 0.1
    assert abs(plain.calibration.images.std() - 1) < 0.1


def test_classes_must_fit():
    with pytest.raises(UserError, match="62 classes; digits has 10"):
        load_splits(replace(DIGITS, dataset="glyphs"))


def test_an_epoch_may_draw_some_of_the_images(cache):
    splits = glyphs.glyphs_splits(GLYPHS, FEW)
    torch.manual_seed(0)
    loader = make_loader(splits.calibration, 64, shuffle=True, n_images=100)
    one, other = (torch.cat([images for images, _ in loader]) for _ in range(2))
    assert len(one) == len(other) == 100
    assert not torch.equal(one, other)
    assert sum(len(labels) for _, labels in make_loader(splits.val, 64, shuffle=True, n_images=10**6)) == 186


def test_blur_keeps_the_mean_and_spreads_by_sigma():
    dot = torch.zeros(3, 2, 21, 21)
    dot[..., 10, 10] = 1
    sigma = torch.tensor([0.0, 0.7, 1.2])
    spread = blur(dot, sigma)
    assert torch.equal(spread[0], dot[0])
    torch.testing.assert_close(spread.sum((2, 3)), torch.ones(3, 2))
    place = torch.arange(21) - 10.0
    variance = (spread.sum(2) * place**2).sum(2)
    torch.testing.assert_close(variance[1:, 0], sigma[1:] ** 2, rtol=0.02, atol=0)


def test_strokes_are_thin_lines():
    torch.manual_seed(0)
    strokes = random_strokes(200, 1, 32, width=1.5)
    assert strokes.shape == (200, 1, 32, 32)
    assert 0 <= strokes.min() < strokes.max() <= 1
    assert 0.01 < (strokes > 0).float().mean() < 0.1
