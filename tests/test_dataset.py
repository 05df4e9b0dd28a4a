"""Loaders, splits and pair files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from apq.errors import UserError
from apq.genes import sample, subnets_of
from apq.presets import APQ_IMAGENET, DIGITS, SPACES
from dataset import check_classes, load_splits
from dataset.imagenet import image_folder_space, report_unreadable, unreadable
from dataset.pairs import PairStore
from dataset.splits import Splits, TensorImages, make_loader
from dataset.table import DATASETS, DataSet
from dataset.transforms import random_affine
from elastic_nn.networks.named_models import named_model


def test_digits_splits_are_fixed_and_apart():
    splits, again = load_splits(DIGITS), load_splits(DIGITS)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [997, 2000, 400]
    assert torch.equal(splits.val.images, again.val.images)
    plain = [splits.train.images, splits.val.images[:400], splits.test.images]
    keys = [{image.numpy().tobytes() for image in part} for part in plain]
    for one, other in ((0, 1), (0, 2), (1, 2)):  # the data set itself repeats a few scans
        assert len(keys[one] & keys[other]) <= 2
    assert all(np.bincount(part.labels).min() >= 35 for part in (splits.val, splits.test))


def test_digits_follow_the_space():
    splits = load_splits(replace(DIGITS, in_channels=3, resolutions=(40,)))
    images, labels = next(iter(make_loader(splits.train, 8)))
    assert images.shape == (8, 3, 40, 40)
    assert labels.shape == (8,)


def test_seeded_epochs_repeat():
    splits = load_splits(DIGITS)

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat([images for images, _ in make_loader(splits.train, 64, shuffle=True)])

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))


def test_affine_without_amount_is_identity():
    images = torch.rand(3, 2, 9, 9)
    torch.testing.assert_close(random_affine(images, degrees=0, shift=0, scale=0, shear=0), images, atol=1e-5, rtol=0)


def make_folder(root, classes=3, train=6, val=2):
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("val", val)):
        for c in range(classes):
            folder = root / part / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


def test_image_folder(tmp_path):
    folder = make_folder(tmp_path / "cats")
    space = image_folder_space(replace(DIGITS, resolutions=(32,)), folder)
    assert (space.n_classes, space.in_channels, space.name) == (3, 3, "digits-cats")
    splits = load_splits(space, folder)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 2, 6)
    assert not set(splits.train.indices) & set(splits.val.indices)
    assert splits.source != load_splits(replace(space, n_classes=3), make_folder(tmp_path / "dogs", train=7)).source
    assert sum(len(labels) for _, labels in make_loader(splits.train, 64, shuffle=True)) == 16  # fewer than a batch
    images, labels = next(iter(make_loader(splits.train, 4, shuffle=True)))
    assert images.shape == (4, 3, 32, 32)
    assert labels.max() < 3


def test_unreadable_images_are_skipped_and_counted(tmp_path, capfd):
    folder = make_folder(tmp_path / "torn", train=20)
    space = image_folder_space(replace(DIGITS, resolutions=(32,)), folder)
    for path in (folder / "val/class1/0.jpg", folder / "val/class2/1.jpg", *(folder / "train/class0").glob("1*.jpg")):
        path.write_bytes(path.read_bytes()[:200])
    (folder / "val/class0/2.pgm").write_bytes(b"P5\n4v 4\n")  # decoders raise more than OSError
    splits = load_splits(space, folder)
    labels = [torch.cat([labels for _, labels in make_loader(splits.test, 2)]) for _ in range(2)]
    assert all(found.tolist() == [0, 0, 1, 2] for found in labels)
    assert unreadable(splits.test) == 3
    n = sum(len(labels) for _, labels in make_loader(splits.train, 16, shuffle=True))
    assert n == len(splits.train)  # others stand in: training batches keep their size
    assert unreadable(splits.train) > 0
    assert "class1/0.jpg" in capfd.readouterr().err
    report_unreadable(splits)
    assert "3 of test" in capfd.readouterr().err


def test_too_few_images_for_the_processes_are_refused():
    with pytest.raises(UserError, match="too few"):
        make_loader(load_splits(DIGITS).train, 5, shuffle=True, world_size=3)


def test_folder_batches_do_not_depend_on_the_number_of_processes(tmp_path):
    folder = make_folder(tmp_path / "shared", train=9)
    splits = load_splits(image_folder_space(replace(DIGITS, resolutions=(32,)), folder), folder)

    def epoch(rank, world_size):
        torch.manual_seed(3)
        return list(make_loader(splits.train, 8, shuffle=True, rank=rank, world_size=world_size))

    alone, first, second = epoch(0, 1), epoch(0, 2), epoch(1, 2)
    for whole, one, other in zip(alone, first, second, strict=True):
        assert torch.equal(whole[0][0::2], one[0])
        assert torch.equal(whole[0][1::2], other[0])
        assert torch.equal(whole[1][1::2], other[1])
    again = epoch(0, 1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, again, strict=True))
    assert not torch.equal(alone[0][0], next(iter(make_loader(splits.train, 8, shuffle=True)))[0])


@pytest.mark.parametrize("of_folder", [False, True])
def test_batches_are_resized_as_a_whole(tmp_path, of_folder):
    if of_folder:
        folder = make_folder(tmp_path / "sides", train=9)
        splits = load_splits(image_folder_space(replace(DIGITS, resolutions=(16, 24, 32)), folder), folder)
    else:
        splits = load_splits(replace(DIGITS, resolutions=(16, 24, 32)))
    batches = list(make_loader(splits.train, 3, shuffle=True, sides=(16, 24, 32)))
    assert {images.size(-1) for images, _ in batches} == {16, 24, 32}
    fixed = list(make_loader(splits.val, 3, sides=(24,)))
    assert {tuple(images.shape[2:]) for images, _ in fixed} == {(24, 24)}


def test_other_classes_are_noticed(tmp_path):
    folder = make_folder(tmp_path / "a")
    space = image_folder_space(DIGITS, folder)
    source = load_splits(space, folder).source
    other = make_folder(tmp_path / "b")
    for part in ("train", "val"):
        (other / part / "class0").rename(other / part / "z")
    with pytest.raises(UserError, match="other classes"):
        check_classes(load_splits(space, other), source, tmp_path)
    check_classes(load_splits(space, folder), source, tmp_path)
    check_classes(load_splits(space, other), None, tmp_path)


def test_bad_image_folders(tmp_path):
    with pytest.raises(UserError, match="no images"):
        image_folder_space(DIGITS, tmp_path)
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="no images"):
        image_folder_space(DIGITS, tmp_path)
    with pytest.raises(UserError, match="--data"):
        load_splits(APQ_IMAGENET)
    with pytest.raises(UserError, match="classes"):
        load_splits(APQ_IMAGENET, make_folder(tmp_path / "three"))


def test_a_data_set_from_outside_is_one_row(monkeypatch):
    def stripes(spec):
        side = spec.resolutions[-1]
        images = TensorImages(torch.zeros(8, spec.in_channels, side, side), torch.arange(8) % spec.n_classes)
        return Splits(images, images, images, images, source={"dataset": "stripes"})

    row = DataSet(name="stripes", in_channels=2, n_classes=4, side=16, load=stripes)
    monkeypatch.setitem(DATASETS, "stripes", row)
    space = replace(DIGITS, name="mine", dataset="stripes", in_channels=2, n_classes=4, resolutions=(16,))
    images, labels = next(iter(make_loader(load_splits(space).val, 8)))
    assert (tuple(images.shape), labels.tolist()) == ((8, 2, 16, 16), [0, 1, 2, 3, 0, 1, 2, 3])
    spec = named_model("mobilenet_v1_small", "stripes")
    assert (spec.in_channels, spec.n_classes, spec.resolution) == (2, 4, 32)
    assert load_splits(named_model("mnasnet0_5", "stripes")).source == {"dataset": "stripes"}
    with pytest.raises(UserError, match="unknown images 'spots'; known: imagenet, glyphs, fashion, digits, stripes"):
        load_splits(replace(space, dataset="spots"))


def test_presets_are_for_images_of_their_data_set():
    for space in SPACES.values():
        row = DATASETS[space.dataset]
        assert (row.in_channels, row.n_classes, row.side) == (space.in_channels, space.n_classes, space.resolutions[-1])


def test_pairs_append_resume_and_refuse(tmp_path):
    store, made_by = PairStore(tmp_path / "acc"), {"seed": 0}
    subnets = subnets_of(DIGITS, sample(DIGITS, 3, np.random.default_rng(0)))
    assert store.open(DIGITS, made_by, 3) == [0, 1, 2]
    for i, subnet in enumerate(subnets):
        store.append(DIGITS, i, subnet, i / 10)
    with (store.path / "pairs.jsonl").open("a") as file:
        file.write('{"arch": {"ks"')  # killed while writing
    assert store.open(DIGITS, made_by, 5) == [3, 4]
    genes, accuracies = store.load(DIGITS)
    assert subnets_of(DIGITS, genes) == subnets
    assert accuracies.tolist() == [0.0, 0.1, 0.2]
    with pytest.raises(UserError, match="seed"):
        store.open(DIGITS, {"seed": 1}, 3)
    with pytest.raises(UserError, match="a space other"):
        store.load(APQ_IMAGENET)
    with pytest.raises(UserError, match="--prepare nothing"):
        PairStore(tmp_path / "nothing").load(DIGITS)
    store.append(DIGITS, 3, subnets[0], 1.5)
    with pytest.raises(UserError, match=r"line 4: accuracy 1.5"):
        store.load(DIGITS)
