"""Batches: every image is in one of them, and no norm ever has one image, whatever the sizes, parts and processes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apq.errors import UserError
from apq.presets import DIGITS
from dataset.splits import Splits, TensorImages, batch_sizes, make_loader
from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.modules.quant_layers import QuantConv2d
from elastic_nn.quantizers import LINEAR
from elastic_nn.training.batchnorm import recalibrate
from elastic_nn.training.engine import parts_of_batch
from elastic_nn.training.finetune import calibrate, finetune, train_epochs
from elastic_nn.training.progressive_shrinking import SupernetPlan, train_supernet
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import Execution, Session

CPU = torch.device("cpu")
FEW = (1, 2, 3, 4, 5, 7, 8)


def numbered(n):
    """Images that are their own numbers."""
    return TensorImages(torch.arange(n).view(n, 1, 1, 1).float(), torch.arange(n))


@settings(max_examples=300)
@given(n=st.integers(0, 5000), batch=st.integers(1, 300), ranks=st.integers(1, 40))
def test_sizes_of_batches(n, batch, ranks):
    sizes = batch_sizes(n, batch, ranks)
    assert sum(sizes) == n
    assert all(size == batch for size in sizes[:-1])
    if n >= batch:
        least = max(min(16, batch // 4), 2 * ranks)
        assert min(batch, least) <= sizes[-1] < batch + least
        assert sizes[-1] >= min(batch, 2 * ranks)
    if ranks <= min(8, batch // 8):
        assert sizes == batch_sizes(n, batch)  # one process has the batches of eight


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [2, 4, 16, 17, 64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_is_used_once_and_no_part_has_one(ranks, batch_size, shuffle):
    """A sweep over images, parts and processes, with the batches of all processes and the parts of each batch."""
    if batch_size < 2 * ranks:
        if shuffle:
            with pytest.raises(UserError, match="too few"):
                make_loader(numbered(9), batch_size, shuffle=True, world_size=ranks)
        return
    for n in sorted({*FEW, *(k * batch_size + rest for k in (1, 2) for rest in FEW), 63, 64, 65, 127, 128, 129}):
        epochs = []
        for rank in range(ranks):
            torch.manual_seed(n)
            loader = make_loader(numbered(n), batch_size, shuffle=shuffle, rank=rank, world_size=ranks)
            epochs.append([labels for _, labels in loader])
            assert len(epochs[-1]) == len(loader)
        batches = list(zip(*epochs, strict=True))  # one entry a batch: the parts of the processes
        seen = sorted(torch.cat([torch.cat(parts) for parts in batches]).tolist() if batches else [])
        assert seen == (list(range(n)) if n >= 2 * ranks or not shuffle else [])
        if n < 2 * ranks:
            continue
        for parts, accumulate in itertools.product(batches, (1, 2, 3, 7, 16, 64, 1000)):
            pieces = parts_of_batch(sum(map(len, parts)), Execution(accumulate=accumulate, world_size=ranks))
            assert 1 <= pieces <= accumulate
            assert min(len(piece) for part in parts for piece in part.tensor_split(pieces)) >= 2


def test_drawn_epochs_have_as_many_images_as_asked():
    for asked in (2, 17, 64, 65, 66, 80):
        sizes = [len(labels) for _, labels in make_loader(numbered(200), 64, shuffle=True, n_images=asked)]
        assert sum(sizes) == asked
        assert min(sizes) >= 2


class Deep(nn.Module):
    """A quantized layer, and a norm on maps of one pixel, where a batch of one image has no variance."""

    def __init__(self):
        super().__init__()
        self.conv = QuantConv2d(1, 4, 3, bias=False, scheme=LINEAR, signed_input=True)
        self.norm, self.head, self.sizes = ElasticBatchNorm2d(4), nn.Linear(4, 10), []
        self.norm.register_forward_pre_hook(lambda norm, args: self.sizes.append((norm.training, len(args[0]))))

    def forward(self, x):
        return self.head(self.norm(self.conv(x).mean((2, 3), keepdim=True)).flatten(1))


@pytest.mark.parametrize("n", [65, 33, 2])
@pytest.mark.parametrize("accumulate", [1, 64])
def test_training_and_recalibration_on_any_number_of_images(n, accumulate):
    """A finetune, a short one on drawn images, calibration, recalibration: all images of an epoch, never one alone."""
    torch.manual_seed(0)
    images = TensorImages(torch.randn(n, 1, 8, 8), torch.arange(n) % 10)
    splits = Splits(images, images, images, images, source={"dataset": "noise"})
    session = Session(splits=splits, device=CPU, execution=Execution(accumulate=accumulate))
    config, net = TrainConfig(epochs=1, lr=0.01, batch_size=64), Deep()

    def trained():
        sizes = [size for training, size in net.sizes if training]
        net.sizes.clear()
        assert min(sizes) >= 2
        return sum(sizes)

    calibrate(net, splits, 8, n, CPU)
    assert trained() == 2 * n  # before the ranges, and after them
    finetune(net, session, config, side=8)
    assert trained() == n
    train_epochs(net, session, config, side=8, n_images=33)
    assert trained() == min(n, 33)
    recalibrate(net, make_loader(images, 64), CPU)
    assert trained() == n


def test_supernets_train_on_any_number_of_images(few):
    parts = (TensorImages(part.images[:65], part.labels[:65], part.augment) for part in (few.train, few.calibration))
    splits = Splits(*parts, few.val, few.test, source=few.source)
    recipe = replace(RECIPES["tiny"], phases=RECIPES["tiny"].phases[:1], recalibration_images=65)
    session = Session(splits=splits, device=CPU, execution=Execution(accumulate=64))
    net, _ = train_supernet(SupernetPlan(space=replace(DIGITS, recipe=None), recipe=recipe), session)
    assert all(norm.num_batches_tracked > 0 for norm in net.modules() if isinstance(norm, ElasticBatchNorm2d))


def test_one_image_is_refused():
    one = TensorImages(torch.randn(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    session = Session(splits=Splits(one, one, one, one, source={}), device=CPU)
    with pytest.raises(UserError, match="batch of one image"):
        recalibrate(Deep(), make_loader(one, 64), CPU)
    with pytest.raises(UserError, match="fewer than two images"):
        train_epochs(Deep(), session, TrainConfig(epochs=1, lr=0.1), side=8)
