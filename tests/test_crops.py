"""Crops of pictures in folders: a batch is cut from whole pictures at its own side, as in the published loaders."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from apq.presets import DIGITS
from dataset import load_splits
from dataset import workers as workers_of_loaders
from dataset.color_jitter import ONCE_FOR_ALL
from dataset.crops import central_crop, random_crop
from dataset.image_file import read_image
from dataset.imagenet import image_folder_space
from dataset.splits import make_loader

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
SIDES = (16, 24, 40)


def photograph(rng, width, height):
    """Smooth shapes and noise, so that every resampling shows."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 5, height))
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(3 * y)], axis=-1)
    return Image.fromarray((128 + 80 * waves + rng.integers(-40, 40, waves.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture
def pictures(tmp_path):
    """The splits of a folder of small JPEG files of several shapes."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 14), ("val", 3)):
        for label in ("a", "b"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(n):
                photograph(rng, 50 + 7 * i, 90 - 3 * i).save(folder / f"{i}.jpg")
    space = image_folder_space(replace(DIGITS, resolutions=SIDES), tmp_path)

    def load():
        return load_splits(space, tmp_path, ONCE_FOR_ALL)

    return load


def by_hand(picture, side):
    """Appendix A.2 of OQA with Pillow alone: the shorter side to ceil(side / 0.875), the centre, normalised."""
    short = math.ceil(side / 0.875)
    width, height = picture.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((n - side) / 2) for n in picture.size)
    cut = np.asarray(picture.crop((left, top, left + side, top + side)), np.float32)
    return torch.from_numpy(((cut / 255 - MEAN) / STD).transpose(2, 0, 1))


def as_published(picture, side, seed, *, jitter=True):
    """The training images of once-for-all, OQA and QFA, by torchvision's first transforms, which these use."""
    colours = [transforms.ColorJitter(brightness=32.0 / 255.0, saturation=0.5)] if jitter else []
    chain = [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), *colours, transforms.ToTensor()]
    torch.manual_seed(seed)
    return transforms.Compose([*chain, transforms.Normalize(MEAN.tolist(), STD.tolist())])(picture)


def path_of(part, index):
    return part.folder.samples[part.indices[index]][0]


@settings(max_examples=60)
@given(side=st.integers(4, 96), width=st.integers(5, 130), height=st.integers(5, 130))
def test_central_crops(side, width, height):
    picture = photograph(np.random.default_rng(side), width, height)
    torch.testing.assert_close(central_crop(side)(picture), by_hand(picture, side), atol=1e-6, rtol=0)


@settings(max_examples=60)
@given(side=st.integers(4, 96), width=st.integers(5, 130), seed=st.integers(0, 2**62), jitter=st.booleans())
def test_random_crops(side, width, seed, jitter):
    picture = photograph(np.random.default_rng(side), width, 60)
    expected = as_published(picture, side, seed, jitter=jitter)
    torch.manual_seed(seed)
    found = random_crop(side, ONCE_FOR_ALL if jitter else None)(picture)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**62))
def test_one_seed_gives_one_crop_box_at_every_side(seed):
    """Red grows to the right and green downwards: the averages tell the middle of the part that is seen."""
    ramp = np.arange(250)
    red, green = np.meshgrid(ramp, ramp)
    picture = Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))
    middles = []
    for side in (32, 50, 64):
        torch.manual_seed(seed)
        shown = random_crop(side)(picture).permute(1, 2, 0).numpy() * STD + MEAN
        middles.append(255 * shown[..., :2].mean((0, 1)))
        spread = 255 * np.ptp(shown[..., :2], axis=(0, 1)) * side / (side - 1)
        middles[-1] = np.concatenate([middles[-1], spread])
    for other in middles[1:]:  # up to the rounding of pixels, and borders
        np.testing.assert_allclose(other[:2], middles[0][:2], atol=0.6)
        np.testing.assert_allclose(other[2:], middles[0][2:], atol=4)


@pytest.mark.parametrize("part", ["calibration", "val", "test"])
def test_batches_for_evaluation_are_cut_at_their_side(pictures, part):
    images = getattr(pictures(), part)
    for sides in ((33,), SIDES, ()):
        torch.manual_seed(1)
        batches = list(make_loader(images, 4, sides=sides))
        assert {batch.size(-1) for batch, _ in batches} <= set(sides or SIDES[-1:])
        found = [image for batch, _ in batches for image in batch]
        assert len(found) == len(images)
        for i, image in enumerate(found):
            expected = by_hand(read_image(path_of(images, i)), image.size(-1))
            torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sides", [SIDES, SIDES[-1:], ()])
def test_batches_for_training_are_cut_at_their_side(pictures, sides):
    images = pictures().train
    loader = make_loader(images, 4, shuffle=True, sides=sides)
    torch.manual_seed(5)
    keys = [key for batch in loader.keys for key in batch]
    torch.manual_seed(5)
    batches = list(loader)
    found = [image for batch, _ in batches for image in batch]
    assert sorted(index for index, _, _ in keys) == list(range(len(images)))
    for (index, seed, _), image in zip(keys, found, strict=True):
        expected = as_published(read_image(path_of(images, index)), image.size(-1), seed)
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    assert {batch.size(-1) for batch, _ in batches} == set(sides or SIDES[-1:])


@pytest.mark.parametrize("part", ["train", "calibration"])
def test_batches_depend_neither_on_processes_nor_on_workers(pictures, part, monkeypatch):
    def epoch(rank=0, world_size=1, workers=2):
        monkeypatch.setattr(workers_of_loaders, "n_cores", lambda: workers)
        own = {"shuffle": part == "train", "rank": rank, "world_size": world_size, "sides": SIDES}
        loader = make_loader(getattr(pictures(), part), 4, **own)
        torch.manual_seed(11)
        batches = list(loader)
        assert workers_of_loaders._idle[-1].loader.num_workers == workers
        return batches

    whole, several = epoch(), epoch(workers=3)
    assert len({images.size(-1) for images, _ in whole}) > 1
    for (images, labels), (same, as_well) in zip(whole, several, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, as_well)
    for (images, labels), first, second in zip(whole, epoch(0, 2), epoch(1, 2), strict=True):
        for offset, (own, own_labels) in enumerate((first, second)):
            assert torch.equal(own, images[offset::2])
            assert torch.equal(own_labels, labels[offset::2])
    workers_of_loaders.end_workers()
