"""Finetunes, and pairs measured by them: small runs, exact properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from apq.genes import largest_subnet
from apq.presets import DIGITS
from apq.resume import Resume
from dataset.splits import TensorImages, make_loader
from elastic_nn.modules.quant_layers import quantizers_off
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.training.engine import derived_seed, evaluate
from elastic_nn.training.finetune import finetune, quantized_subnet
from elastic_nn.training.pairs import pair_subnet, short_finetune_top1
from elastic_nn.training.progressive_shrinking import SupernetPlan, train_supernet
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import Session

CPU = torch.device("cpu")
TINY = RECIPES["tiny"]


def test_finetune_learns_and_keeps_the_best(few):
    torch.manual_seed(0)
    supernet = DynamicQuantizedProxylessNASNets(space=DIGITS)
    subnet = pair_subnet(DIGITS, 0, 0, quantized=True)
    net = quantized_subnet(supernet, subnet, few, 2, CPU)
    seen = []
    config = TrainConfig(epochs=20, lr=0.1, batch_size=16)
    best, weights = finetune(net, Session(splits=few, device=CPU), config, side=32, log=seen.append)
    assert [record["epoch"] for record in seen] == list(range(21))
    assert best == max(record["val_top1"] for record in seen)
    assert seen[-1]["loss"] < 0.95 * seen[1]["loss"]
    net.load_state_dict(weights)
    assert evaluate(net, make_loader(few.val, 256), CPU).top1 == best


def test_killed_finetune_ends_the_same(few, tmp_path, monkeypatch):
    """Killed after its second epoch and continued: the same final weights, and the same best epoch after the kill."""

    def run(name):
        torch.manual_seed(1)
        net = DynamicProxylessNASNets(space=DIGITS).get_active_subnet()
        seen = []
        config = TrainConfig(epochs=5, lr=0.1, batch_size=16)
        resume = Resume(tmp_path / name, {"a": 1}, "finetune")
        best = finetune(net, Session(splits=few, device=CPU), config, side=32, resume=resume, log=seen.append)
        return net.state_dict(), *best, seen

    weights, top1, best, seen = run("whole")
    assert top1 > max(record["val_top1"] for record in seen[:3])
    save, count = Resume.save, []

    def save_then_die(*args):
        save(*args)
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    resumed, resumed_top1, resumed_best, _ = run("killed")
    assert resumed_top1 == top1
    for one, other in ((weights, resumed), (best, resumed_best)):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_fresh_subnet_is_calibrated_under_its_own_statistics(few):
    """Under the statistics of the supernet, ranges of a subnet would clip nearly all activations."""
    torch.manual_seed(0)
    supernet = DynamicQuantizedProxylessNASNets(space=DIGITS)
    for module in supernet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1e4)
    net = quantized_subnet(supernet, largest_subnet(DIGITS), few, 2, CPU).eval()
    with torch.no_grad(), quantizers_off(net):
        exact = net(few.calibration.images)
    with torch.no_grad():
        error = (net(few.calibration.images) - exact).abs().mean()
    assert error < 0.3 * exact.std()  # calibrated first, it is 0.8 and more


def test_pairs_depend_on_seed_and_index_alone(few):
    torch.manual_seed(0)
    supernet = DynamicQuantizedProxylessNASNets(space=DIGITS)
    subnet = pair_subnet(DIGITS, 5, 7, quantized=True)
    assert subnet == pair_subnet(DIGITS, 5, 7, quantized=True) != pair_subnet(DIGITS, 5, 8, quantized=True)
    assert len({derived_seed(seed, index) for seed in range(30) for index in range(30)}) == 900
    session = Session(splits=few, device=CPU, seed=12)
    first = short_finetune_top1(supernet, subnet, session, TINY)
    torch.rand(3)
    supernet.activate(largest_subnet(DIGITS))
    assert short_finetune_top1(supernet, subnet, session, TINY) == first


def test_a_pair_may_be_finetuned_on_a_part_of_the_images(few):
    torch.manual_seed(0)
    supernet = DynamicQuantizedProxylessNASNets(space=DIGITS)
    looks = []

    def count(images):
        looks.append(len(images))
        return images

    counted = replace(few, train=TensorImages(few.train.images, few.train.labels, count))
    for n, expected in ((None, [64, 64]), (80, [64, 16]), (70, [70])):
        looks.clear()
        session = Session(splits=counted, device=CPU)
        short_finetune_top1(supernet, largest_subnet(DIGITS), session, replace(TINY, pair_epoch_images=n))
        assert looks == expected


def test_a_space_of_several_resolutions_trains_and_measures_at_each(few, monkeypatch):
    space = replace(DIGITS, name="elastic", resolutions=(16, 24, 32))
    seen = []
    forward = MBConvNet.forward
    monkeypatch.setattr(MBConvNet, "forward", lambda net, x: seen.append(x.size(-1)) or forward(net, x))
    recipe = replace(TINY, phases=tuple(replace(p, train=replace(p.train, batch_size=16)) for p in TINY.phases))
    session = Session(splits=few, device=CPU)
    net, _ = train_supernet(SupernetPlan(space=space, recipe=recipe), session)
    assert set(seen) == {16, 24, 32}
    quantized = DynamicQuantizedProxylessNASNets(space=space)
    quantized.load_float_weights(net.state_dict())
    for index in range(4):
        subnet = pair_subnet(space, 0, index, quantized=True)
        seen.clear()
        short_finetune_top1(quantized, subnet, session, recipe)
        assert set(seen) == {subnet.resolution}
