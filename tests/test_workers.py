"""The processes that read image files: started once for all splits and sizes, and right whoever stops early."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from test_dataset import make_folder
from torch.utils.data import Dataset
from torchvision.transforms import v2

from apq import exits
from apq.errors import UserError
from apq.presets import DIGITS
from dataset import file_batches, load_splits, workers
from dataset.file_batches import normalised
from dataset.imagenet import image_folder_space
from dataset.splits import make_loader
from elastic_nn.training.batchnorm import recalibration_batches
from elastic_nn.training.session import Session

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_workers(monkeypatch):
    monkeypatch.setattr(workers, "n_cores", lambda: 2)
    workers.end_workers()
    yield
    workers.end_workers()


@pytest.fixture
def folder(tmp_path):
    folder = make_folder(tmp_path / "images", train=12, val=4)
    return load_splits(image_folder_space(replace(DIGITS, resolutions=(16, 24)), folder), folder)


def processes():
    return {process.pid for process in multiprocessing.active_children()}


class Numbers(Dataset):
    """Items of a data set from outside, which are their own numbers; `seen` counts how often each is read."""

    def __init__(self, n):
        self.n, self.seen = n, torch.zeros(n, dtype=torch.int64).share_memory_()

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        index, seed, side = key
        if index == 13 and self.n == 13 + 1:
            raise UserError("thirteen")
        self.seen[index] += 1
        return torch.full((1, side or 2, side or 2), float(index)), index, seed


def test_one_set_of_processes_reads_all_splits_at_all_sizes(folder):
    session = Session(splits=folder, device=CPU)
    loaders = [
        session.loader(folder.train, 8, shuffle=True, sides=(16, 24)),
        recalibration_batches(folder, (16,), CPU, 8),
        session.loader(folder.val, 256, sides=(24,)),
        make_loader(folder.test, 3),
        session.loader(folder.train, 20, shuffle=True, n_images=20, sides=(18,)),
    ]
    seen = []
    for loader in loaders * 2:
        assert sum(len(labels) for _, labels in loader) > 0
        seen.append(processes())
    assert len(seen[0]) == 2
    assert all(found == seen[0] for found in seen)


def test_a_split_that_came_later_is_read_by_new_processes(folder):
    list(make_loader(folder.val, 4))
    before, few = processes(), folder.train.thinned(5)
    found = torch.cat([labels for _, labels in make_loader(few, 4)]).tolist()
    assert found == [few.folder.samples[i][1] for i in few.indices]
    assert len(processes()) == 2  # the others have ended
    assert not processes() & before
    again = processes()
    list(make_loader(folder.val, 4))
    assert processes() == again


def test_whoever_stops_early_disturbs_nobody(folder):
    val = make_loader(folder.val, 2)
    right = list(val)
    for _ in range(2):
        assert torch.equal(next(iter(make_loader(folder.train, 4)))[1], next(iter(make_loader(folder.train, 4)))[1])
        assert all(torch.equal(one, other) for (one, _), (other, _) in zip(val, right, strict=True))
    for images, _ in make_loader(folder.train, 4):
        assert len(images) == 4
        break
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(val, right, strict=True))
    assert len(processes()) == 2


def test_whoever_stops_early_leaves_the_processes_to_the_next(folder):
    """They go on when the reader that stopped is forgotten."""
    reader = iter(make_loader(folder.val, 2))
    next(reader)
    before = processes()
    del reader
    list(make_loader(folder.val, 2))
    assert processes() == before


def test_a_killed_process_is_told_in_a_line_and_replaced(folder):
    """Whatever the program does meanwhile, torch raises at once. The next reader has new processes."""
    right = [labels.tolist() for _, labels in make_loader(folder.val, 2)]
    before = processes()

    def killed():
        os.kill(min(before), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RuntimeError, match="DataLoader worker") as error:
        killed()
    assert "a process that reads images was killed" in exits._mistake(error.value)
    assert [labels.tolist() for _, labels in make_loader(folder.val, 2)] == right
    assert not processes() & before


def test_loaders_may_be_read_side_by_side():
    one, other = Numbers(40), Numbers(40)
    pairs = zip(make_loader(one, 4), make_loader(other, 4), strict=True)
    for (_, first), (_, second) in pairs:
        assert first.tolist() == second.tolist()
    assert (one.seen == 1).all()
    assert (other.seen == 1).all()


@pytest.mark.parametrize(("batch", "chunk", "n"), [(1, 16, 100), (7, 3, 15), (50, 16, 2), (100, 64, 1)])
def test_batches_are_whole_and_in_order_however_they_are_cut(batch, chunk, n, monkeypatch):
    monkeypatch.setattr(file_batches, "CHUNK", chunk)
    images = Numbers(100)
    loader = make_loader(images, batch)
    batches = list(loader)
    assert len(batches) == len(loader) == n
    assert torch.cat([labels for _, labels in batches]).tolist() == [*range(100)]
    for values, labels in batches:
        assert values.dtype == torch.float32
        assert values[:, 0, 0, 0].tolist() == labels.tolist()
    assert (images.seen == 1).all()


def test_files_are_read_up_to_the_last_that_is_asked_for():
    images = Numbers(400)
    first = list(make_loader(images, 64, n_images=100))
    assert [len(labels) for _, labels in first] == [64, 64]  # as `recalibrate` takes them: whole batches
    assert images.seen.tolist() == [1] * 128 + [0] * 272
    assert len(make_loader(images, 64, n_images=64)) == 1
    assert len(make_loader(images, 64, n_images=9999)) == 7


def test_a_mistake_in_a_process_is_told_and_others_go_on():
    with pytest.raises(UserError, match="thirteen"):
        list(make_loader(Numbers(14), 2))
    assert len(list(make_loader(Numbers(8), 2))) == 4


def test_reading_draws_one_seed_from_the_global_generator():
    """So that the images of an epoch do not depend on what was prepared before, and by how many processes."""
    states = []
    for n_images in (4, 40):
        torch.manual_seed(0)
        list(make_loader(Numbers(40), 4, n_images=n_images))
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


def test_the_number_of_threads_stays():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in make_loader(Numbers(20), 4):
            assert torch.get_num_threads() == 2
        with pytest.raises(UserError):
            list(make_loader(Numbers(14), 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bytes_become_numbers_as_in_torchvision():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    scaled = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    assert torch.equal(normalised(codes), scaled(codes))


def test_all_images_of_a_batch_may_be_unreadable(folder, tmp_path):
    for file in (tmp_path / "images/val").glob("class0/*.jpg"):
        file.write_bytes(b"x")
    sizes = [len(labels) for _, labels in make_loader(folder.test, 2)]
    assert sizes == [0, 0, 2, 2, 2, 2]


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(workers, "n_cores", lambda: 16)
    assert workers.n_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers.n_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert workers.n_workers() == 1
