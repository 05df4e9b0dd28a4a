"""Norms behave as torch's, and recalibration gives every kind of norm the statistics of the images, and only them."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from apq.errors import UserError
from dataset.splits import TensorImages, make_loader
from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.modules.quant_layers import shared_batch
from elastic_nn.quantizers.batchquant import BatchQuantizer
from elastic_nn.training.batchnorm import recalibrate

CPU = torch.device("cpu")
SETTINGS = list(itertools.product((True, False), (True, False), (0.1, None)))  # affine, tracked, momentum


class OwnNorm(nn.BatchNorm2d):
    """A norm as other libraries derive them, with dropout of its own behind it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(super().forward(x))


class Shaped(nn.Module):
    """A network that gives its norm images of another shape."""

    def __init__(self, norm, *shape):
        super().__init__()
        self.norm, self.shape = norm, shape

    def forward(self, x):
        return self.norm(x.view(len(x), *self.shape))


KINDS = {
    "BatchNorm1d": lambda **how: Shaped(nn.BatchNorm1d(12, **how), 12),
    "BatchNorm1d of sequences": lambda **how: Shaped(nn.BatchNorm1d(3, **how), 3, 4),
    "BatchNorm2d": lambda **how: Shaped(nn.BatchNorm2d(3, **how), 3, 2, 2),
    "BatchNorm3d": lambda **how: Shaped(nn.BatchNorm3d(3, **how), 3, 1, 2, 2),
    "SyncBatchNorm": lambda **how: Shaped(nn.SyncBatchNorm(3, **how), 3, 2, 2),
    "elastic": lambda **how: Shaped(ElasticBatchNorm2d(3, **how), 3, 2, 2),
    "own": lambda **how: Shaped(OwnNorm(3, **how), 3, 2, 2),
}


def images_of(n, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.normal(2, 3, (n, 3, 2, 2)) * np.array([1, 10, 100]).reshape(1, 3, 1, 1)
    return TensorImages(torch.tensor(pixels).float(), torch.zeros(n, dtype=torch.int64))


def by_hand(net, images, sizes):
    """Mean and unbiased variance of each channel: averages over batches, weighted by images."""
    pixels = images.images.numpy().astype(np.float64).reshape(len(images), *net.shape)
    axes = tuple(axis for axis in range(pixels.ndim) if axis != 1)
    cuts = np.split(pixels, np.cumsum(sizes)[:-1])
    means = [cut.mean(axes) for cut in cuts]
    variances = [cut.var(axes, ddof=0) * (k := cut.size / cut.shape[1]) / (k - 1) for cut in cuts]
    return (np.average(values, axis=0, weights=sizes) for values in (means, variances))


@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.1), (False, None)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_norm_has_the_statistics_of_the_images(kind, affine, momentum):
    net, images = KINDS[kind](affine=affine, momentum=momentum), images_of(100)
    net.train()
    net(torch.randn(8, 3, 2, 2))  # older statistics do not count
    recalibrate(net, make_loader(images, 40), CPU)
    mean, variance = by_hand(net, images, [40, 40, 20])
    np.testing.assert_allclose(net.norm.running_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(net.norm.running_var, variance, rtol=1e-5)
    assert net.norm.momentum == momentum
    assert all(module.training for module in net.modules())
    recalibrate(net, make_loader(images, 40), CPU, 60)  # in whole batches
    first = TensorImages(images.images[:80], images.labels[:80])
    np.testing.assert_allclose(net.norm.running_mean, next(by_hand(net, first, [40, 40])), rtol=1e-5)


def test_instance_norms_with_statistics_are_recalibrated():
    net, images = Shaped(nn.InstanceNorm2d(3, track_running_stats=True), 3, 2, 2), images_of(60)
    recalibrate(net, make_loader(images, 40), CPU)
    each = images.images.double()
    torch.testing.assert_close(net.norm.running_mean.double(), each.mean((2, 3)).mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.norm.running_var.double(), each.var((2, 3)).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_without_statistics_are_left_alone(kind):
    net = KINDS[kind](track_running_stats=False).eval()
    before = copy.deepcopy(net.state_dict())
    recalibrate(net, make_loader(images_of(20), 10), CPU)
    assert not net.norm.training
    assert before.keys() == net.state_dict().keys()


class Block(nn.Module):
    """A norm behind dropout and stochastic depth, with part of the network frozen."""

    def __init__(self, drop):
        super().__init__()
        self.drop, self.depth = nn.Dropout(drop), StochasticDepth(drop, "row")
        self.norm, self.lstm = nn.BatchNorm2d(3), nn.LSTM(2, 2, num_layers=2, dropout=drop)
        self.norm_of_lstm = nn.BatchNorm1d(2)

    def forward(self, x):
        x = self.norm(self.drop(x) + self.depth(x) + nn.functional.dropout(x, 0.5, self.training))
        return self.norm_of_lstm(self.lstm(x.flatten(0, 2))[0])


def test_norms_alone_train():
    """The statistics are those of evaluation, whatever the seed. Each layer's mode is as it was."""
    torch.manual_seed(0)
    net, images, found = Block(0.9), images_of(64), []
    net.lstm.eval()
    for seed in (1, 2):
        torch.manual_seed(seed)
        recalibrate(net, make_loader(images, 32), CPU)
        found.append(copy.deepcopy(net.state_dict()))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    mean, variance = by_hand(Shaped(None, 3, 2, 2), images, [32, 32])
    np.testing.assert_allclose(net.norm.running_mean, 3 * mean, rtol=1e-5)
    np.testing.assert_allclose(net.norm.running_var, 9 * variance, rtol=1e-5)
    assert [module.training for module in (net, net.drop, net.norm, net.lstm)] == [True, True, True, False]


def test_a_norm_that_runs_twice_averages_both_runs_and_an_idle_one_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.idle = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.idle.running_mean.fill_(7)

        def forward(self, x):
            return self.norm(x) + self.norm(10 * x)

    net, images = Twice(), images_of(80)
    recalibrate(net, make_loader(images, 40), CPU)
    mean, variance = by_hand(Shaped(None, 3, 2, 2), images, [40, 40])
    np.testing.assert_allclose(net.norm.running_mean, 5.5 * mean, rtol=1e-5)
    np.testing.assert_allclose(net.norm.running_var, 50.5 * variance, rtol=1e-5)
    assert net.idle.running_mean.tolist() == [7, 7, 7]


def test_statistics_that_cannot_be_recalibrated_are_refused():
    class Lazy(nn.BatchNorm2d):
        def forward(self, x):
            return x - self.running_mean[:, None, None]

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))

        def forward(self, x):
            return x

    loader = make_loader(images_of(20), 10)
    with pytest.raises(UserError, match="layer 0 is a Lazy, which does not average"):
        recalibrate(nn.Sequential(Lazy(3)), loader, CPU)
    with pytest.raises(UserError, match="layer 0 is a Foreign, whose statistics"):
        recalibrate(nn.Sequential(Foreign()), loader, CPU)
    with pytest.raises(UserError, match="no images"):
        recalibrate(nn.Sequential(nn.BatchNorm2d(3)), make_loader(images_of(0), 10), CPU)
    frozen = nn.Sequential(FrozenBatchNorm2d(3))
    recalibrate(frozen, loader, CPU)  # its statistics are constants
    assert frozen[0].running_mean.tolist() == [0, 0, 0]


class Functional(nn.Module):
    """A network that normalises by a function, with the statistics of its norm or of buffers of its own."""

    def __init__(self, how):
        super().__init__()
        self.how, self.norm = how, nn.BatchNorm2d(3)
        self.register_buffer("middle", torch.zeros(3))
        self.register_buffer("spread", torch.ones(3))

    def forward(self, x):
        return self.how(self, self.norm(x))


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (
            lambda net, x: F.batch_norm(x, net.norm.running_mean, net.norm.running_var),
            "norm.running_mean",
        ),
        (lambda net, x: F.batch_norm(x, running_mean=net.middle, running_var=net.spread), "middle"),
        (lambda net, x: F.batch_norm(x, net.middle.clone(), net.spread.clone()), "a tensor that is no buffer"),
        (lambda net, x: torch.batch_norm(x, None, None, net.middle, net.spread, True, 0.1, 1e-5, False), "middle"),
        (lambda net, x: F.instance_norm(x[:, :2], net.middle[:2], net.spread[:2]), "middle"),
        (lambda net, x: net.norm.forward(x), "norm.running_mean"),
    ],
)
def test_statistics_that_a_function_uses_are_refused_by_name(how, name):
    net = Functional(how)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=f"^{name}.* cannot be recalibrated"):
        recalibrate(net, make_loader(images_of(20), 10), CPU)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    net.compile(backend="eager")  # compiled or not, the same calls are seen
    with pytest.raises(UserError, match=f"^{name}"):
        recalibrate(net, make_loader(images_of(20), 10), CPU)
    net._compiled_call_impl = None
    net.how = lambda net, x: F.batch_norm(x, None, None, training=True)  # has no statistics
    recalibrate(net, make_loader(images_of(20), 10), CPU)
    assert net.norm.running_mean.any()


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, None])
def test_a_network_is_as_it_was_after_any_exception(error):
    class Fails(nn.Module):
        def forward(self, x):
            if error and len(x) < 10:
                raise error
            return x

    net = nn.Sequential(nn.BatchNorm2d(3), BatchQuantizer(signed=True), Fails())
    recalibrate(net, make_loader(images_of(20), 10), CPU)
    before, flags = copy.deepcopy(net.state_dict()), dict(vars(net[1]))
    with pytest.raises(error or UserError):
        recalibrate(net, [(torch.randn(n, 3, 2, 2), None) for n in (10, 5, 1)], CPU)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert (vars(net[1]), net[0].momentum, net.training) == (flags, 0.1, True)
    assert not net[0]._forward_hooks


@pytest.mark.parametrize(("affine", "tracked", "momentum"), SETTINGS)
def test_elastic_norms_behave_as_those_of_torch(affine, tracked, momentum):
    """Outputs, gradients and statistics, in training and evaluation, to the last bit."""
    how = {"affine": affine, "track_running_stats": tracked, "momentum": momentum}
    ours, torchs = ElasticBatchNorm2d(6, **how), nn.BatchNorm2d(6, **how)
    for step in range(6):
        for norm in (ours, torchs):
            norm.train(step % 3 < 2)
        x = torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(step)) * 3 + 1
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours(one).square().sum().backward()
        torchs(other).square().sum().backward()
        assert torch.equal(ours(x), torchs(x))
        assert torch.equal(one.grad, other.grad)
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in torchs.state_dict().items())
    narrow = nn.BatchNorm2d(4, **how).eval()
    narrow.load_state_dict({key: value[:4] if value.ndim else value for key, value in torchs.state_dict().items()})
    assert torch.equal(ours.eval()(x[:, :4]), narrow(x[:, :4]))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("affine", "tracked", "momentum"), SETTINGS)
def test_synchronised_norms_behave_as_those_of_torch(one_process, affine, tracked, momentum):
    how = {"affine": affine, "track_running_stats": tracked, "momentum": momentum}
    ours, torchs = ElasticBatchNorm2d(6, **how).double(), nn.BatchNorm2d(6, **how).double()
    ours.synchronised = True
    for _ in range(3):
        x = torch.randn(5, 6, 3, 3, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(ours(x), torchs(x))
    for key, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_refuse_statistics_that_they_cannot_share(kind):
    net = KINDS[kind]()
    if kind == "elastic":
        with shared_batch(net, 2):
            assert net.norm.synchronised
        return
    message = f"layer norm is a {type(net.norm).__name__}, whose statistics 2 processes"
    with pytest.raises(UserError, match=message), shared_batch(net, 2):
        pass
    with shared_batch(net, 1):
        pass
    with pytest.raises(UserError, match=message), shared_batch(KINDS[kind](track_running_stats=False), 2):
        pass
    with shared_batch(nn.InstanceNorm2d(3), 2):  # each image has its own statistics
        pass
    with shared_batch(nn.SyncBatchNorm(3).to("meta"), 2):  # as on a GPU
        pass
