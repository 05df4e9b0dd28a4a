"""Ranges of activations of any size: how they are calibrated, and how training moves them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apq.presets import DIGITS, OQA_MBV2_GLYPHS
from dataset.splits import TensorImages, make_loader
from elastic_nn.modules.quant_layers import quantized_layers, relative_parameters
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.quantize_model import quantize_model
from elastic_nn.networks.supernet_file import build_supernet, with_quantizers
from elastic_nn.quantizers import (
    BATCHQUANT,
    FLOAT,
    LINEAR,
    LINEAR_PUBLISHED,
    LSQ,
    LSQ_SCALE_FREE,
    SCHEMES,
    LinearActivationQuantizer,
    LsqQuantizer,
    PerBits,
)
from elastic_nn.quantizers.lsq import quantize_lsq
from elastic_nn.training.calibration import calibrate_ranges
from elastic_nn.training.engine import Training, train_one_epoch
from elastic_nn.training.optimizer import ScaleFreeSGD
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES

CPU = torch.device("cpu")


# Calibration


@settings(max_examples=40)
@given(st.floats(-4, 4), st.integers(5, 8), st.booleans(), st.integers(0, 1000))
def test_the_clip_is_the_largest_magnitude_whatever_its_size(exponent, bits, published, seed):
    x = 10**exponent * torch.randn(200, generator=torch.Generator().manual_seed(seed)).relu()
    quantizer = LinearActivationQuantizer(signed=False, published=published)
    quantizer.bits = bits
    quantizer.calibrate(x)
    largest = x.max().item()
    assert quantizer.range.item() == (min(largest, 6.0) if published else largest)
    if not published:
        assert (quantizer(x) - x).abs().max() <= largest / (2**bits - 1) / 2 * 1.001


def relu_net(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 4))


def quantized(net, scheme, bits, images):
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    quantize_model(net, names, scheme, dict.fromkeys(names, False))
    for layer in quantized_layers(net).values():
        layer.set_bits(bits, bits)
    calibrate_ranges(net, images)
    return net


@pytest.mark.parametrize(("scheme", "most"), [(LINEAR, math.inf), (LINEAR_PUBLISHED, 6.0)], ids=["linear", "published"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_only_published_clips_are_capped_in_networks_without_relu6(scheme, most, activation):
    net, images = relu_net(activation), 60 * torch.randn(64, 8)
    with torch.no_grad():
        inputs = {"2": net[:2](images), "4": net[:4](images)}
        exact = net(images)
    largest = {name: values.max().item() for name, values in inputs.items()}
    assert (max(largest.values()) > 20) == (activation is nn.ReLU)
    quantized(net, scheme, 8, images)
    for name, layer in quantized_layers(net).items():
        if name in largest:  # the first layer's input is the image
            assert layer.act_quant.range.item() == pytest.approx(min(largest[name], most))
    with torch.no_grad():
        error = ((net(images) - exact).norm() / exact.norm()).item()
    # Each of three layers rounds weights and inputs to 1/127 and 1/255 of their largest values.
    assert error > 0.3 if (scheme, activation) == (LINEAR_PUBLISHED, nn.ReLU) else error < 0.02


def test_zeros_say_nothing_about_the_range():
    quantizer = LinearActivationQuantizer(signed=False)
    quantizer.calibrate(torch.zeros(5))
    assert quantizer.range.item() == 6.0
    quantizer.calibrate(torch.tensor([0.25]))
    quantizer.calibrate(torch.zeros(5))
    assert quantizer.range.item() == 0.25


# Steps


def reference(usual, norm, lr, gradients):
    """Clips by torch's own SGD on t = u log s, with torch's own clipping."""
    t = nn.Parameter(torch.zeros(len(usual), dtype=torch.float64))
    optimizer = torch.optim.SGD([t], lr=lr, momentum=0.9, nesterov=True)
    usual, seen = torch.tensor(usual, dtype=torch.float64), []
    for gradient in gradients:
        optimizer.zero_grad()
        clips = usual * torch.exp(t / usual)
        clips.backward(gradient)
        nn.utils.clip_grad_norm_([t], norm)
        optimizer.step()
        seen.append((usual * torch.exp(t / usual)).detach())
    return torch.stack(seen)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0.5, 50), st.sampled_from([0.005, 0.02]))
def test_clips_step_as_torch_steps_their_logarithms(seed, norm, lr):
    generator = torch.Generator().manual_seed(seed)
    gradients = 3 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    usual = [3.0, 1.0, 2.0]
    clips = [nn.Parameter(torch.tensor([u], dtype=torch.float64)) for u in usual]
    groups = [{"name": name, "params": clips if name == "ranges" else []} for name in ("decayed", "free", "ranges")]
    optimizer = ScaleFreeSGD(groups, dict(zip(clips, usual, strict=True)), lr=lr, momentum=0.9, nesterov=True)
    for gradient, expected in zip(gradients, reference(usual, norm, lr, gradients), strict=True):
        for clip, own in zip(clips, gradient, strict=True):
            clip.grad = own.reshape(1).clone()
        optimizer.clip_gradients(norm)
        optimizer.step()
        torch.testing.assert_close(torch.cat([s.detach() for s in clips]), expected, rtol=1e-6, atol=0)


def test_a_step_keeps_the_sign_and_at_most_doubles_or_halves():
    clips = [nn.Parameter(torch.tensor([value])) for value in (1e-6, -2.0, 1e6)]
    optimizer = ScaleFreeSGD([{"params": clips}], dict.fromkeys(clips, 1.0), lr=10.0)
    for clip in clips:
        clip.grad = torch.tensor([1e9])
    optimizer.step()
    assert [clip.item() for clip in clips] == pytest.approx([0.5e-6, -4.0, 0.5e6])


class Units(nn.Module):
    """A layer whose input is `c` times larger, and whose output is divided by `c`: the same function."""

    def __init__(self, layer, c):
        super().__init__()
        self.layer, self.c = layer, c

    def forward(self, x):
        return self.layer(x * self.c) / self.c


def network(c, scheme, images):
    """A quantized network in which the inputs of two layers are measured in units of `c`."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(Units(nn.Conv2d(8, 8, 3, stride=2, bias=False), c), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Units(nn.Linear(8, 10, bias=False), c)),
    ).double()
    return narrowed(net, scheme, images)


def narrowed(net, scheme, images):
    """Quantize in float64. Clips are half of the largest values, so that there is something to learn."""
    names = ["0", "3.layer", "8.layer"]
    quantize_model(net, names, scheme, dict.fromkeys(names, False))
    for layer in quantized_layers(net).values():
        layer.set_bits(4, 5)
        for operand in layer.operands().values():
            operand.double()
    calibrate_ranges(net, images)
    with torch.no_grad():
        for clip in relative_parameters(net):
            clip.mul_(0.5)
    return net


def trained(net, few, lr=0.1):
    images = TensorImages(few.train.images.double(), few.train.labels)
    config = TrainConfig(epochs=2, lr=lr, batch_size=32)
    training = Training(net, config, CPU)
    for epoch in range(2):
        train_one_epoch(training, make_loader(images, 32), epoch)
    return net


def split_state(net):
    """The weights, and the clips and steps, of a network."""
    clips = {id(clip) for clip in relative_parameters(net)}
    named = dict(net.named_parameters())
    return ({k: p.detach() for k, p in named.items() if (id(p) in clips) == which} for which in (False, True))


@pytest.mark.parametrize("scheme", [LINEAR, LSQ_SCALE_FREE, BATCHQUANT], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("c", [2.0**-10, 1e-3, 300.0])
def test_units_of_activations_do_not_change_training(scheme, c, few):
    """Momentum, decay of weights and clipping of gradients are those of all recipes."""
    images = few.calibration.images.double()
    plain, other = (trained(network(unit, scheme, images), few) for unit in (1.0, c))
    weights, clips = split_state(plain)
    other_weights, other_clips = split_state(other)
    tolerance = {"rtol": 0, "atol": 0} if math.log2(c).is_integer() else {"rtol": 1e-6, "atol": 1e-9}
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, msg=name, **tolerance)
    start = dict(network(1.0, scheme, images).named_parameters())
    for name, value in clips.items():
        factor = c if "act_quant" in name and name != "0.act_quant" else 1.0
        torch.testing.assert_close(other_clips[name] / factor, value, msg=name, **tolerance)
        assert not torch.equal(start[name], value)  # it was learned
    assert bool(clips) == (scheme != BATCHQUANT)


@pytest.mark.parametrize("scheme", [LINEAR_PUBLISHED, LSQ], ids=lambda scheme: scheme.name)
def test_published_steps_depend_on_the_units(scheme, few):
    """As published, ranges a thousand times smaller are thrown far from where they should be."""
    images = few.calibration.images.double()
    key = "8.layer.act_quant." + ("range" if scheme == LINEAR_PUBLISHED else "step")
    plain, small = (dict(trained(network(c, scheme, images), few).named_parameters())[key].item() for c in (1.0, 1e-3))
    assert not 1e-4 * plain < small < 1e-2 * plain


@pytest.mark.parametrize("scheme", [LINEAR, LSQ_SCALE_FREE], ids=lambda scheme: scheme.name)
@settings(max_examples=5)
@given(exponent=st.floats(-3, 3))
def test_a_rescaled_layer_and_its_successor_learn_the_same_ranges(scheme, exponent, few):
    """One is c times larger, the other c times smaller. The weights are kept: SGD itself is not scale-free for them."""
    c, images, found = 10**exponent, few.calibration.images.double(), []
    for factor in (1.0, c):
        net = network(1.0, FLOAT, images)
        with torch.no_grad():
            for tensor in net[1].parameters():
                tensor.mul_(factor)
            net[3].layer.weight.div_(factor)
        narrowed(net.requires_grad_(False), scheme, images)
        found.append({key: p.item() for key, p in trained(net, few).named_parameters() if "_quant" in key})
    plain, other = found
    factors = {"3.layer.act_quant": c, "3.layer.weight_quant": 1 / c}
    for key, value in plain.items():
        factor = factors.get(key.rpartition(".")[0], 1.0)
        assert other[key] == pytest.approx(factor * value, rel=1e-6)


def test_a_published_range_below_zero_comes_back():
    """The gradient passes the floor. By hand: that of the clip is the sum of the gradients of values above it."""
    quantizer = LinearActivationQuantizer(signed=False, published=True)
    x, grad = torch.tensor([0.0, 0.5, 2.0, 3.0]), torch.tensor([8.0, -1.0, 2.0, -4.0])
    quantizer.range.data.fill_(-0.147)
    y = quantizer(x)
    assert y.isfinite().all()
    assert y.abs().max() < 1e-20
    y.backward(grad)
    assert quantizer.range.grad.item() == pytest.approx(-1 + 2 - 4 + 8 / 2 - 8 / 2, abs=1e-6)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert quantizer.range.item() == pytest.approx(3.0, abs=0.3)


def test_a_step_of_zero_can_grow():
    """By hand: every value is at the highest or the lowest code, and the gradient is the sum over codes."""
    v, step = torch.tensor([0.5, -0.25, 2.0]), torch.zeros(1, requires_grad=True)
    quantize_lsq(v, step, 3, signed=True).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert step.grad.item() == pytest.approx((3 * 1 - 4 * 2 + 3 * 3) / math.sqrt(3 * 3))


def test_which_parameters_move_by_fractions():
    assert set(LinearActivationQuantizer(signed=True).relative_parameters().values()) == {3.0}
    assert not LinearActivationQuantizer(signed=True, published=True).relative_parameters()
    assert not LsqQuantizer(signed=True).relative_parameters()  # as OQA
    assert len(PerBits(lambda: LsqQuantizer(signed=True, scale_free=True), (2, 4)).relative_parameters()) == 2
    for scheme in SCHEMES.values():
        for quantizer in (scheme.weight(), scheme.activation(True)):
            learned = {id(parameter) for parameter in quantizer.learned_parameters()}
            assert {id(clip) for clip in quantizer.relative_parameters()} <= learned


# Published behaviour by name


def test_the_published_recipe_has_the_published_quantizer():
    published = {name for name, recipe in RECIPES.items() if recipe.quantizer == "linear-published"}
    assert published == {name for name in RECIPES if "imagenet" in name}
    assert {recipe.quantizer for recipe in RECIPES.values()} == {"linear", "linear-published"}


def test_a_float_supernet_gets_the_quantizers_of_a_scheme():
    source = DynamicProxylessNASNets(space=DIGITS)
    linear = with_quantizers(source, LINEAR)
    published = with_quantizers(linear, LINEAR_PUBLISHED)
    assert with_quantizers(published, LINEAR_PUBLISHED) is published
    assert (linear.scheme, published.scheme) == (LINEAR, LINEAR_PUBLISHED)
    own = published.state_dict()
    assert all(torch.equal(own[key], value) for key, value in source.state_dict().items())
    assert relative_parameters(linear)
    assert not relative_parameters(published)
    steps = build_supernet(OQA_MBV2_GLYPHS, LSQ)
    assert with_quantizers(steps, LINEAR) is steps  # it was trained with its own


@pytest.mark.parametrize("scale", [1.0, 2.0**-10])
@pytest.mark.parametrize(
    ("quantizer", "start", "fallen"),
    [
        *[(LinearActivationQuantizer(False), 1.0, fallen) for fallen in (1e-2, 1e-4, 1e-8, -0.147)],
        *[(LsqQuantizer(False, scale_free=True), 0.1, fallen) for fallen in (1e-3, 1e-6, -1e-3)],
    ],
    ids=lambda value: str(value) if isinstance(value, float) else type(value).__name__,
)
def test_a_clip_that_training_has_made_small_comes_back(quantizer, start, fallen, scale):
    """The least error of values between 0 and 1 is that of a clip near 1, or of a step near 1/15."""
    quantizer.bits = 4
    ((clip, _),) = quantizer.relative_parameters().items()
    with torch.no_grad():
        clip.fill_(start * scale)
    groups = {"decayed": [], "free": [], "ranges": [clip]}
    groups = [{"name": name, "params": params} for name, params in groups.items()]
    sgd = ScaleFreeSGD(groups, quantizer.relative_parameters(), lr=0.05, momentum=0.9, nesterov=True)
    with torch.no_grad():
        clip.fill_(fallen * scale)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        values = torch.rand(256, generator=generator) * scale
        loss = 10 * (quantizer(values) - values).square().mean() / scale**2
        sgd.zero_grad()
        loss.backward()
        sgd.clip_gradients(1.0)
        sgd.step()
    best = 1 / 15 if isinstance(quantizer, LsqQuantizer) else 1.0
    assert 0.8 * best < abs(clip.item()) / scale < 1.5 * best  # above 1 no value pulls at a clip
