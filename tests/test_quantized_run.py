"""Every priced layer runs through its quantizers, however the network refers to it; or the network is refused."""

from __future__ import annotations

import copy
import functools
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from apq.errors import UserError
from apq.policy import layer_names, policy_from_strategy, priced_layers
from elastic_nn.modules.quant_layers import QuantConv2d, quantizers_off
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.networks.quantize_model import quantize_model, restore_model, set_policy
from elastic_nn.quantizers import LINEAR
from elastic_nn.training.calibration import calibrate_ranges, signed_inputs
from elastic_nn.training.policies import quantized_model
from lut.bitfusion import BitFusion
from lut.costs import cost_of
from lut.traced import traced_layers

SHAPE = (3, 8, 8)
BITS = 2


class Net(nn.Module):
    """A convolution, two more that `middle` runs, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(3, 4)

    def middle(self, x):
        return self.b(self.a(x).relu())

    def forward(self, x):
        return self.head(self.middle(self.first(x).relu()).relu().mean((2, 3)))


class Alias(Net):
    def __init__(self):
        super().__init__()
        self.b = self.a


class Listed(Net):
    def __init__(self):
        super().__init__()
        self.order = [self.a, self.b]

    def middle(self, x):
        for conv in self.order:
            x = conv(x).relu()
        return x


class Closure(Net):
    def __init__(self):
        super().__init__()
        a, b = self.a, self.b
        self.run = lambda x: b(a(x).relu())

    def middle(self, x):
        return self.run(x)


class Stored(Net):
    """References in a dict, in a partial function, and in a second container."""

    def __init__(self):
        super().__init__()
        self.by_name = {"a": self.a}
        self.part = functools.partial(self.a.__call__)
        self.again = nn.Sequential(self.b, self.b)

    def middle(self, x):
        return self.again(self.part(self.by_name["a"](x).relu()))


class Keyword(Net):
    def middle(self, x):
        return self.b(input=self.a(input=x).relu())


SOUND = {"plain": Net, "alias": Alias, "list": Listed, "closure": Closure, "stored": Stored, "keyword": Keyword}


class Weights(TorchFunctionMode):
    """Collects the weights and inputs of all convolutions and linear layers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.conv2d, F.linear):
            self.seen.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def images():
    torch.manual_seed(1)
    return torch.randn(16, *SHAPE)


def trained(make):
    torch.manual_seed(0)
    return make().eval()


def quantized(net, bits=BITS):
    """The layers of a network, which is quantized at these bits, and what restores it."""
    layers = traced_layers(net, SHAPE[-1])
    names = layer_names(layers)
    before = quantize_model(net, names, LINEAR, signed_inputs(net, names, images()), SHAPE)
    policy = policy_from_strategy("linear", layers, [[bits, -1], *([bits, bits] for _ in names[1:])])
    set_policy(net, policy)
    calibrate_ranges(net, images())
    return layers, policy, before


@pytest.mark.parametrize("name", SOUND)
def test_every_weight_that_is_multiplied_is_quantized(name):
    net = trained(SOUND[name])
    expected = net(images())
    layers, _, before = quantized(net)
    with Weights() as weights, torch.no_grad():
        net(images())
    assert len(weights.seen) == len(layers)
    for i, (values, weight) in enumerate(weights.seen):
        assert len(weight.unique()) <= 2**BITS
        assert len(values.unique()) <= 2**BITS or i == 0  # the image is not quantized
    restore_model(net, before)
    assert type(net.a) is nn.Conv2d
    assert torch.equal(net(images()), expected)
    with Weights() as weights, torch.no_grad():
        net(images())
    assert all(len(weight.unique()) > 2**BITS for _, weight in weights.seen)


@pytest.mark.parametrize("name", SOUND)
def test_a_network_equals_the_one_without_detours(name):
    """Each reference runs the layer that has the bits, so a plain network with these weights gives the same."""
    net, plain = trained(SOUND[name]), trained(Net)
    if name in ("alias", "stored"):
        plain.middle = {
            "alias": lambda x: plain.a(plain.a(x).relu()),
            "stored": lambda x: plain.b(plain.b(plain.a(plain.a(x).relu()))),
        }[name]
    if name == "list":
        plain.middle = lambda x: plain.b(plain.a(x).relu()).relu()
    for one in (net, plain):
        quantized(one, 4) if one is net or name != "alias" else quantized_alias(one)
    assert torch.equal(net(images()), plain(images()))


def quantized_alias(plain):
    """The plain network that runs `a` twice, without `b`."""
    names = ("first", "a", "head")
    quantize_model(plain, names, LINEAR, signed_inputs(plain, names, images()), SHAPE)
    for layer in (plain.first, plain.a, plain.head):
        layer.set_bits(4, 4)
    calibrate_ranges(plain, images())


def test_hooks_stay():
    net, calls = trained(Net), []
    net.a.register_forward_pre_hook(lambda *_: calls.append("before"))
    net.a.register_forward_hook(lambda *_: calls.append("after"))
    net.a.register_forward_hook(lambda module, args, output: output * 0)
    _, _, before = quantized(net)
    for _ in range(2):
        calls.clear()
        with quantizers_off(net):
            out = net.a(torch.randn(1, *SHAPE))
        assert calls == ["before", "after"]
        assert not out.any()
        restore_model(net, before)


def test_an_alias_is_stored_once_and_runs_twice():
    net = trained(Alias)
    layers, policy, _ = quantized(net)
    two = traced_layers(trained(Net), SHAPE[-1])
    assert [layer.name for layer in layers] == ["first", "a", "a", "head"]
    model = BitFusion()
    one_cost, two_cost = (cost_of(priced_layers(ls, p), model) for ls, p in ((layers, policy), (two, both_policy(two))))
    assert one_cost.macs == two_cost.macs
    assert one_cost.latency_ms == pytest.approx(two_cost.latency_ms)
    assert one_cost.params == two_cost.params - (81 + 3)
    assert one_cost.size_bytes == two_cost.size_bytes - (math.ceil(81 * BITS / 8) + 3 * 4)


def both_policy(layers):
    return policy_from_strategy("linear", layers, [[BITS, -1], *([BITS, BITS] for _ in layers[1:])])


# What is refused


class Functional(Net):
    """Multiplies the weights of a layer without running it."""

    def middle(self, x):
        return self.b(F.conv2d(x, self.a.weight, padding=1) + self.a(x))


class Direct(Net):
    """Runs a layer past its hooks, which calibration needs."""

    def middle(self, x):
        return self.b(self.a.forward(x) + self.a(x))


class Replaced(Net):
    """A forward method of the instance, as some libraries put in."""

    def __init__(self):
        super().__init__()
        self.a.forward = self.a.forward


class Hidden(Net):
    """A layer that the network does not know."""

    def __init__(self):
        super().__init__()
        self.block = nn.Identity()
        hidden = [nn.Conv2d(3, 3, 1)]
        self.block.register_forward_hook(lambda module, args, output: hidden[0](output))

    def middle(self, x):
        return self.b(self.a(self.block(x)))


class Loose(Net):
    """Weights of the network itself."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 3, 1, 1))

    def middle(self, x):
        return self.b(F.conv2d(self.a(x), self.w))


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight


class Parametrized(Net):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.a)


class Changing(Net):
    """Runs another layer each time."""

    def __init__(self):
        super().__init__()
        self.turn = 0

    def middle(self, x):
        self.turn += 1
        return self.a(x) if self.turn % 2 else self.b(x)


class Product(Net):
    def middle(self, x):
        return self.b((self.a(x)[:, :, None] * self.a.weight[:, :, 1, 1, None, None]).sum(1))


class Half(Net):
    def __init__(self):
        super().__init__()
        self.bfloat16()


REFUSED = {
    Functional: "Functional multiplies a.weight without a quantizer",
    Direct: "layer a runs within Direct by its forward method alone",
    Replaced: "a multiplies a.weight without a quantizer",
    Hidden: "layer block is a Identity; only Conv2d and Linear of torch, with weights of their own",
    Loose: "the network is a single Loose, or multiplies weights outside its modules",
    Tied: "layers a and b share their weights",
    Parametrized: "layer a is a ParametrizedConv2d",
    Changing: "b multiplies b.weight without a quantizer",
    Product: "it multiplies parameter a.weight with mul",
    Half: "layer first has bfloat16 weights: .*float",
}


@pytest.mark.parametrize("make", REFUSED)
def test_what_would_run_unquantized_is_refused_by_name(make):
    net = trained(make)
    with torch.no_grad():
        x = images().to(net.first.weight.dtype)
        expected = net(x)
    if make is Changing:
        net.turn = 0
    kinds = {name: type(module) for name, module in net.named_modules()}
    listed = layer_names(traced_layers(net, SHAPE[-1])) if make is not Product else ()
    names = ("first", "a", "b", "head") if make in (Functional, Direct, Product) else listed
    with pytest.raises(UserError, match=REFUSED[make]):
        quantize_model(net, names, LINEAR, dict.fromkeys(names, True), SHAPE)
    assert {name: type(module) for name, module in net.named_modules()} == kinds  # as before
    net.turn = 0
    assert torch.equal(net(x), expected)


def test_a_layer_with_bits_that_does_not_run_is_refused():
    class Idle(Net):
        def middle(self, x):
            return self.a(x)

    names = ("first", "a", "b", "head")
    with pytest.raises(UserError, match="layer b has bits in the policy, but does not run"):
        quantize_model(trained(Idle), names, LINEAR, dict.fromkeys(names, True), SHAPE)
    with pytest.raises(UserError, match="layer c is not in the network"):
        quantize_model(trained(Net), ("first", "c"), LINEAR, dict.fromkeys(("first", "c"), True))


def test_a_head_of_training_alone_is_neither_priced_nor_quantized():
    class Auxiliary(Net):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(3, 4)

        def forward(self, x):
            return super().forward(x) + (self.aux(x.mean((2, 3))) if self.training else 0)

    net = trained(Auxiliary).train()
    layers, _, _ = quantized(net)
    assert "aux" not in layer_names(layers)
    assert type(net.aux) is nn.Linear
    assert net.training


# Copies and number formats


def test_copies_are_networks_of_their_own():
    net = trained(Alias)
    _, _, before = quantized(net)
    expected = net(images())
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(net), torch.load(saved, weights_only=False)):
        assert torch.equal(copied(images()), expected)
        assert copied.a is copied.b
        assert isinstance(copied.a, QuantConv2d)
        copied.a.set_bits(8, 8)
        assert not torch.equal(copied(images()), expected)
        restore_model(copied, before)
        assert type(copied.b) is nn.Conv2d
        assert torch.equal(net(images()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_is_quantized_as_its_float32_twin(few, dtype):
    spec = named_model("mobilenet_v1_small", "digits")
    torch.manual_seed(0)
    net = build_model(spec).to(dtype)
    twin = copy.deepcopy(net).float()
    layers = traced_layers(net, 32, in_channels=1)
    assert layers == traced_layers(twin, 32, in_channels=1)
    policy = policy_from_strategy("linear", layers, [[8, -1], *([4, 4] for _ in layer_names(layers)[1:])])
    for one in (net, twin):
        quantized_model(one, policy, few, 32, 32, torch.device("cpu"))
    assert torch.equal(net.eval()(few.val.images), twin.eval()(few.val.images))
