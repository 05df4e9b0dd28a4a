"""A supernet of mixed precision is trained for a step; a subnet is cut out, calibrated, saved and loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apq.errors import UserError
from apq.genes import largest_subnet, sample, smallest_subnet, subnets_of
from apq.layers import layers_of
from apq.presets import QFA_MBV3_GLYPHS
from apq.resume import Resume
from apq.space import FULL_PRECISION, Stage
from dataset.splits import Splits, TensorImages, make_loader
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.networks.subnet_file import load_subnet, save_subnet
from elastic_nn.networks.supernet_file import load_supernet, save_supernet
from elastic_nn.quantizers import BATCHQUANT, MIXED, BatchQuantizer
from elastic_nn.training.batchnorm import recalibrate
from elastic_nn.training.engine import Training, evaluate, train_one_epoch
from elastic_nn.training.finetune import finetune, quantized_subnet
from elastic_nn.training.optimizer import make_optimizer
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record, train_supernet
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import Session

CPU = torch.device("cpu")
SPACE = replace(  # two stages of the twin: as much as is needed to meet every kind of layer
    QFA_MBV3_GLYPHS,
    name="small-qfa",
    resolutions=(24,),
    stages=(
        Stage(width=8, stride=2, depths=(1, 2), squeeze=True, activation="h_swish"),
        Stage(width=16, stride=2, depths=(1, 2), activation="relu"),
    ),
)
schemes = pytest.mark.parametrize("scheme", MIXED.values(), ids=MIXED)


@pytest.fixture(scope="module")
def noise():
    generator = torch.Generator().manual_seed(0)

    def part(n):
        images = torch.rand(n, 1, 24, 24, generator=generator)
        return TensorImages(images, torch.randint(SPACE.n_classes, (n,), generator=generator), None)

    return Splits(part(64), part(40), part(48), part(8), source={"dataset": "noise"})


def supernet(scheme=BATCHQUANT):
    torch.manual_seed(0)
    return DynamicQuantizedProxylessNASNets(space=SPACE, scheme=scheme)


def some_subnets(n=2, seed=0):
    drawn = subnets_of(SPACE, sample(SPACE, n, np.random.default_rng(seed)))
    return [largest_subnet(SPACE), smallest_subnet(SPACE), *drawn]


def active_bits(net):
    return {
        name.removesuffix(".conv"): (layer.weight_quant.bits, layer.act_quant.bits)
        for name, layer in quantized_layers(net).items()
    }


def batch_quantizers(net):
    return [part for part in net.modules() if isinstance(part, BatchQuantizer)]


def trained(noise, scheme):
    net = supernet(scheme)
    subnets = some_subnets()
    training = Training(net, TrainConfig(epochs=1, lr=0.01), CPU)
    choose = partial(list, [partial(net.activate, subnet) for subnet in subnets])
    loss = train_one_epoch(training, make_loader(noise.train, 32, sides=(24,)), 0, choose)
    return net, loss


@schemes
def test_a_supernet_trains_and_its_subnets_live(scheme, noise, tmp_path):
    net, loss = trained(noise, scheme)
    assert np.isfinite(loss)
    moved = [name for name, p in net.named_parameters() if name.endswith((".scale", ".offset")) and p.abs().sum() > 0]
    assert bool(moved) == (scheme.name != "lsq-per-bits")
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())
    subnet = some_subnets(1, seed=5)[-1]
    alone = quantized_subnet(net, subnet, noise, 40, CPU)
    found = evaluate(alone, make_loader(noise.val, 16, sides=(24,)), CPU)
    whole = evaluate(alone, make_loader(noise.val, 48, sides=(24,)), CPU)
    assert found.loss == pytest.approx(whole.loss, rel=1e-3)  # however batches are cut: none has statistics of its own
    save_subnet(tmp_path / "n.pt", SPACE, subnet, alone.state_dict(), scheme=scheme)
    loaded, space, again = load_subnet(tmp_path / "n.pt")
    assert (space, again) == (SPACE, subnet)
    x = noise.val.images[:4]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), alone.eval()(x))


@torch.no_grad()
def test_networks_run_at_the_bits_that_are_priced():
    net = supernet()
    for subnet in some_subnets(4):
        net.activate(subnet)
        found, alone = active_bits(net), active_bits(net.get_active_subnet())
        layers = [layer for layer in layers_of(SPACE, subnet) if ".squeeze." not in layer.name]
        assert {layer.name: (layer.w_bits, layer.a_bits) for layer in layers}.items() <= found.items()
        assert list(alone.values()) == [(layer.w_bits, layer.a_bits) for layer in layers]


@torch.no_grad()
def test_an_extracted_subnet_equals_the_supernet(noise):
    net, x = supernet(), noise.val.images[:8]
    for subnet in some_subnets(2):
        net.activate(subnet)
        recalibrate(net, make_loader(noise.calibration, 20, sides=(24,)), CPU)
        torch.testing.assert_close(net.get_active_subnet().eval()(x), net.eval()(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_was_never_calibrated_is_an_error(noise):
    net, x = supernet().eval(), noise.val.images[:2]
    with pytest.raises(UserError, match=r"quantizer of blocks\.0\.depthwise has no statistics .* at 4 bits: calibrate"):
        net(x)
    with pytest.raises(UserError, match="calibrate the network first"):
        net.get_active_subnet().eval()(x)
    recalibrate(net, make_loader(noise.calibration, 20, sides=(24,)), CPU)
    expected = net(x)
    net.activate(largest_subnet(SPACE))  # what it is already
    assert torch.equal(net(x), expected)
    net.activate(smallest_subnet(SPACE))  # the statistics of another are none
    with pytest.raises(UserError, match=r"blocks\.0\.depthwise has no statistics .* at 2 bits"):
        net(x)


@torch.no_grad()
def test_recalibration_weighs_batches_by_their_images(noise):
    net = supernet().get_active_subnet()
    seen, part = [], net.blocks[1].expand.conv.act_quant.of_bits["4"]
    estimate = part.estimate

    def noted(x, bits, of_all):
        found = estimate(x, bits, of_all)
        seen.append((len(x), *(edge.mean().item() for edge in found)))
        return found

    part.estimate = noted
    recalibrate(net, make_loader(noise.calibration, 16, sides=(24,)), CPU)
    sizes, lows, highs = np.array(seen).T
    assert sizes.tolist() == [16, 16, 8]
    assert part.low.item() == pytest.approx(np.average(lows, weights=sizes), rel=1e-5)
    assert part.high.item() == pytest.approx(np.average(highs, weights=sizes), rel=1e-5)
    assert part.seen.item() == 40
    classifier = set(net.classifier.act_quant.modules())
    of_layers = [q for q in batch_quantizers(net) if q not in classifier]
    assert {q.seen.item() for q in of_layers if q.bits == 4} == {40}  # every layer of the largest subnet runs at 4 bits
    assert not any(q.calibrated for q in of_layers if q.bits != 4)
    assert {q.bits: q.seen.item() for q in batch_quantizers(net) if q in classifier} == {2: 0, 3: 0, 4: 0, 8: 40}
    recalibrate(net, make_loader(noise.calibration, 16, sides=(24,)), CPU, 16)
    assert part.seen.item() == 16  # anew, not added


def test_scales_and_offsets_are_not_decayed():
    net = supernet()
    groups = {group["name"]: group for group in make_optimizer(net, TrainConfig(epochs=1, lr=0.1)).param_groups}
    members = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    learned = [p for name, p in net.named_parameters() if "_quant." in name]
    assert {id(p) for p in learned} == members["ranges"]
    assert any(isinstance(m, BatchQuantizer) and id(m.offset) in members["ranges"] for m in net.modules())
    assert groups["ranges"]["weight_decay"] == groups["free"]["weight_decay"] == 0 < groups["decayed"]["weight_decay"]


def test_float_weights_and_files_of_supernets(noise, tmp_path):
    source = DynamicProxylessNASNets(space=SPACE)
    net, _ = trained(noise, BATCHQUANT)
    net.load_float_weights(source.state_dict())
    assert torch.equal(net.first_conv.conv.weight, source.first_conv.conv.weight)
    save_supernet(tmp_path / "s.pt", net, "tiny", {"dataset": "noise"})
    loaded, _ = load_supernet(tmp_path / "s.pt")
    assert loaded.scheme.name == "batchquant"
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))


def test_full_precision_is_a_number_of_bits(noise):
    net, x = supernet(), noise.val.images[:4]
    source = DynamicProxylessNASNets(space=SPACE)
    net.load_float_weights(source.state_dict())
    for layer in quantized_layers(net).values():
        layer.weight_quant.bits = layer.act_quant.bits = FULL_PRECISION
    with torch.no_grad():
        torch.testing.assert_close(net.train()(x), source.train()(x))


def test_a_finetune_measures_with_the_ranges_of_its_weights(noise):
    net = quantized_subnet(supernet(), smallest_subnet(SPACE), noise, 40, CPU)
    part = net.blocks[1].expand.conv.act_quant.of_bits["2"]
    before = part.high.item()
    config = TrainConfig(epochs=2, lr=0.05, batch_size=32)
    best, weights = finetune(net, Session(splits=noise, device=CPU), config, side=24)
    assert part.high.item() != before
    net.load_state_dict(weights)
    assert evaluate(net, make_loader(noise.val, 48, sides=(24,)), CPU).top1 == best
    labels = noise.val.labels[:4]
    assert torch.isfinite(F.cross_entropy(net.eval()(noise.val.images[:4]), labels))


@pytest.fixture(scope="module")
def mixed_training(noise):
    """`mixed_training(file)` -> supernet and records of a training in mixed precision, whose state is in the file."""
    torch.manual_seed(0)
    start = DynamicProxylessNASNets(space=SPACE)
    recipe = replace(
        RECIPES["tiny-qfa"],
        phases=tuple(replace(p, train=replace(p.train, epochs=2, batch_size=32)) for p in RECIPES["tiny-qfa"].phases),
        recalibration_images=40,
        epoch_val_images=16,
    )

    plan = SupernetPlan(space=SPACE, recipe=recipe, scheme=BATCHQUANT, start=start)
    session = Session(splits=noise, device=CPU)

    def train(file):
        return train_supernet(plan, session, Resume(file, supernet_record(plan, session), "training"))

    return train


@pytest.fixture(scope="module")
def whole(mixed_training, tmp_path_factory):
    """What a training gives that is not killed."""
    return mixed_training(tmp_path_factory.mktemp("mixed") / "state")


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_training_that_was_killed_continues_alike(mixed_training, whole, tmp_path, monkeypatch, killed_after):
    expected, records = whole
    assert [len(record["epochs"]) for record in records] == [3, 2]  # the first also has what it starts from
    real, saves = Resume.save, []

    def save(resume, state):
        real(resume, state)
        saves.append(resume)
        if len(saves) == killed_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "save", save)
        with pytest.raises(KeyboardInterrupt):
            mixed_training(tmp_path / "state")
    found, again = mixed_training(tmp_path / "state")
    assert again == records
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key]), key
