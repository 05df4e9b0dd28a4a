"""Quantized layers in any network, accuracy of policies, and their files."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from apq.errors import UserError
from apq.genes import largest_subnet
from apq.model import subnet_model
from apq.policy import layer_names, policy_from_strategy
from apq.presets import DIGITS
from elastic_nn.modules.quant_layers import QuantConv2d, quantized_layers, quantizers, quantizers_off
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.networks.policy_file import load_policy_model, save_policy_model
from elastic_nn.networks.quantize_model import quantize_model, restore_model, set_policy
from elastic_nn.quantizers import KMEANS, LINEAR
from elastic_nn.training.calibration import calibrate_ranges, calibration_table, signed_inputs
from elastic_nn.training.engine import TrainConfig
from elastic_nn.training.finetune import finetune
from elastic_nn.training.policies import PolicyScorer, ShortFinetune, quantized_model
from elastic_nn.training.session import Session
from lut.traced import traced_layers

CPU = torch.device("cpu")
SMALL = named_model("mobilenet_v1_small", "digits")


class Odd(nn.Module):
    """Layers of every kind, one of them used twice, one inside a container."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.block = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect"))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.block(self.block(self.first(x)))
        return self.head(x.mean((2, 3)))


def networks():
    return {
        "odd": (Odd(), 3),
        "resnet18": (torchvision.models.resnet18(num_classes=5), 3),
        "small": (build_model(SMALL), 1),
        "subnet": (build_model(subnet_model(DIGITS, largest_subnet(DIGITS))), 1),
    }


def prepared(net, in_channels):
    """The network after a few batches, its layers, and images."""
    torch.manual_seed(0)
    images = torch.randn(16, in_channels, 32, 32)
    for _ in range(3):
        net(images)
    layers = traced_layers(net.eval(), 32, in_channels=in_channels)
    return layers, images


@pytest.mark.parametrize("name", networks())
def test_swap_and_restore(name):
    net, in_channels = networks()[name]
    layers, images = prepared(net, in_channels)
    names, expected, keys = layer_names(layers), net(images), list(net.state_dict())
    signed = signed_inputs(net, names, images)
    before = quantize_model(net, names, LINEAR, signed)
    assert set(quantized_layers(net)) == set(names)
    assert [key for key in net.state_dict() if not key.endswith(".range")] == keys
    with quantizers_off(net):
        assert torch.equal(net(images), expected)
    calibrate_ranges(net, images)
    assert not torch.equal(net(images), expected)
    assert (net(images) - expected).abs().mean() < 0.1 * expected.std()  # 8 bits change little
    restore_model(net, before)
    assert list(net.state_dict()) == keys
    assert not quantizers(net)
    assert torch.equal(net(images), expected)


def test_float_and_quantized_layers_share_their_weights():
    net, signed = Odd(), dict.fromkeys(["first", "block.1", "head"], True)
    quantize_model(net, ["first", "block.1", "head"], LINEAR, signed)
    assert isinstance(net.first, QuantConv2d)
    assert not net.first.act_quant.quantizes  # the image
    assert net.block[1].padding_mode == "reflect"
    before = quantize_model(
        net, ["first", "block.1", "head"], KMEANS, dict.fromkeys(["first", "block.1", "head"], True)
    )
    assert before["head"].weight is net.head.weight


def test_what_cannot_be_quantized_is_named():
    class Own(nn.Conv2d):
        pass

    net = nn.Sequential(Own(3, 4, 3))
    with pytest.raises(UserError, match="layer 0 is a Own"):
        quantize_model(net, ["0"], LINEAR, {"0": True})
    with pytest.raises(UserError, match="a single Linear"):
        quantize_model(nn.Linear(2, 2), [""], LINEAR, {"": True})
    hooked = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(UserError, match="layer 0 is a Linear"):
        quantize_model(hooked, ["0"], LINEAR, {"0": True})


def test_signs_and_bits():
    net = build_model(named_model("mobilenet_v2_small", "digits"))
    layers, images = prepared(net, 1)
    names = layer_names(layers)
    signed = signed_inputs(net, names, images)
    # After ReLU6 nothing is negative; the linear bottlenecks and the image are both.
    assert signed["features.3.conv.0.0"]
    assert not signed["features.3.conv.1.0"]
    assert not signed["classifier.1"]
    quantize_model(net, names, LINEAR, signed)
    strategy = [[8, -1], *([3 + i % 4, 2 + i % 5] for i in range(len(names) - 1))]
    policy = policy_from_strategy("linear", layers, strategy)
    set_policy(net, policy)
    for i, layer in enumerate(quantized_layers(net).values()):
        assert layer.weight_quant.bits == strategy[i][0]
        if i:
            assert layer.act_quant.bits == strategy[i][1]


def test_calibration_table_equals_calibration():
    net = build_model(SMALL)
    layers, images = prepared(net, 1)
    names = layer_names(layers)
    quantize_model(net, names, LINEAR, signed_inputs(net, names, images))
    table = calibration_table(net, images, range(2, 9))
    policy = policy_from_strategy("linear", layers, [[8, -1], *([3, 4] for _ in names[1:])])
    set_policy(net, policy)
    calibrate_ranges(net, images)
    for name, layer in quantized_layers(net).items():
        assert torch.equal(layer.weight_quant.range, table[name, "weight_quant", layer.weight_quant.bits]["range"])
        if name != names[0]:
            assert torch.equal(layer.act_quant.range, table[name, "act_quant", 4]["range"])


@pytest.mark.parametrize("quantizer", ["linear", "kmeans"])
def test_scores_depend_on_the_policy_alone(few, quantizer):
    torch.manual_seed(0)
    net = build_model(SMALL)
    layers = traced_layers(net, 32, in_channels=1)
    strategies = {"linear": ([8, -1], [4, 4]), "kmeans": (8, 2)}[quantizer]
    first, rest = strategies
    policies = [
        policy_from_strategy(quantizer, layers, [first, *[bits] * (len(layer_names(layers)) - 1)])
        for bits in (rest, [8, 8] if quantizer == "linear" else 8)
    ]
    config = TrainConfig(epochs=1, lr=0.01, batch_size=32)
    short = ShortFinetune(train=config, side=32, train_images=64, val_images=50)
    session = Session(splits=few, device=CPU)
    scorer = PolicyScorer(net, layer_names(layers), quantizer, short, session)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    low, high, again = scorer.accuracy(policies[0]), scorer.accuracy(policies[1]), scorer.accuracy(policies[0])
    assert low == again
    trained = net.state_dict()
    assert any(not torch.equal(trained[key], state[key]) for key in state)  # it did train
    torch.manual_seed(0)
    other = PolicyScorer(build_model(SMALL), layer_names(layers), quantizer, short, session)
    assert (other.accuracy(policies[1]), other.original) == (high, scorer.original)


@pytest.mark.parametrize("quantizer", ["linear", "kmeans"])
def test_finetuned_file(few, tmp_path, quantizer):
    torch.manual_seed(0)
    net = build_model(SMALL)
    layers = traced_layers(net, 32, in_channels=1)
    n = len(layer_names(layers))
    strategy = [[8, -1], *([4, 5] for _ in range(n - 1))] if quantizer == "linear" else [3] * n
    policy = policy_from_strategy(quantizer, layers, strategy)
    signed = quantized_model(net, policy, few, 32, 64, CPU)
    config = TrainConfig(epochs=1, lr=0.05, batch_size=32)
    _, weights = finetune(net, Session(splits=few, device=CPU), config, side=32)
    net.load_state_dict(weights)
    if quantizer == "kmeans":
        for layer in quantized_layers(net).values():
            assert len(layer.weight_quant(layer.weight).unique()) <= 8
    file = tmp_path / "net.pt"
    save_policy_model(file, SMALL, policy, layers, signed, weights, images={"dataset": "few digits"})
    again, spec, found, found_layers, images = load_policy_model(file)
    assert (spec, found, found_layers, images) == (SMALL, policy, layers, {"dataset": "few digits"})
    assert torch.equal(again.eval()(few.val.images), net.eval()(few.val.images))

    data = torch.load(file, weights_only=True)
    broken = {
        "signs of inputs": {**data, "signed": None},
        "of another shape": {**data, "model": {**data["model"], "n_classes": 11}},
        "bits for": {**data, "quantization": {**data["quantization"], "strategy": strategy[:-1]}},
    }
    if quantizer == "kmeans":
        labels = "classifier.weight_quant.labels"
        odd = {**data["state_dict"], labels: data["state_dict"][labels] + 8}
        broken["clusters of layer classifier"] = {**data, "state_dict": odd}
    for message, wrong in broken.items():
        torch.save(wrong, file)
        with pytest.raises(UserError, match=message):
            load_policy_model(file)


def test_a_policy_that_diverges_scores_nothing(few):
    net = build_model(SMALL)
    layers = traced_layers(net, 32, in_channels=1)
    names = layer_names(layers)
    config = TrainConfig(epochs=1, lr=1e30, batch_size=32)
    short = ShortFinetune(train=config, side=32, train_images=128, val_images=50)
    scorer = PolicyScorer(net, names, "linear", short, Session(splits=few, device=CPU))
    assert scorer.accuracy(policy_from_strategy("linear", layers, [[8, -1], *([8, 8] for _ in names[1:])])) == (0, 0)


def test_thinned_images(few):
    thin = few.val.thinned(10)
    assert len(thin) == 10
    assert torch.equal(thin.images[1], few.val.images[10])
    assert len(few.val.thinned(10_000)) == len(few.val)
