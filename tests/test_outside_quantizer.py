"""A quantizer from outside, by public calls alone: trained in mixed precision, calibrated, saved, used by policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from apq.errors import UserError
from apq.genes import smallest_subnet
from apq.policy import QUANTIZERS, PolicyQuantizer, layer_names, policy_from_strategy
from apq.presets import DIGITS
from dataset.splits import make_loader
from elastic_nn.modules.quant_layers import quantized_layers, quantizers
from elastic_nn.networks import DynamicProxylessNASNets
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.networks.policy_file import load_policy_model, save_policy_model
from elastic_nn.networks.subnet_file import load_subnet, save_subnet
from elastic_nn.networks.supernet_file import load_quantized_supernet, save_supernet
from elastic_nn.quantizers import LINEAR, SCHEMES, KMeansWeightQuantizer, PerBits, Quantizer, QuantScheme
from elastic_nn.training.engine import Training, train_one_epoch
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.inheritance import check_recipe, check_start, first_supernet
from elastic_nn.training.policies import PolicyScorer, ShortFinetune, quantized_model
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.sampling import draw_subnets
from elastic_nn.training.session import Session
from lut.traced import traced_layers

CPU = torch.device("cpu")


class LearnedClip(Quantizer):
    """Uniform codes up to a learned clip that all bit-widths share; a clip of 0 is not set."""

    def __init__(self, signed=True):
        super().__init__(signed)
        self.clip = nn.Parameter(torch.zeros(1))

    def quantize(self, v):
        scale, (low, high) = self._scale(), self.code_range
        exact = (v / scale).clamp(low, high)
        return (exact + (exact.round() - exact).detach()) * scale

    def _scale(self):
        return self.clip.clamp_min(1e-4) / self.code_range[1]

    @torch.no_grad()
    def calibrate(self, v):
        self.clip.clamp_(min=v.abs().max())

    @torch.no_grad()
    def forget(self):
        self.clip.zero_()

    @property
    def started(self):
        return bool(self.clip > 0)

    @torch.no_grad()
    def scale_and_zero_point(self, v=None):
        return self._scale(), torch.zeros(1)


@pytest.fixture
def scheme(monkeypatch):
    made = QuantScheme("learned-clip", weight=LearnedClip, activation=LearnedClip, mixed_precision=True)
    monkeypatch.setitem(SCHEMES, made.name, made)
    monkeypatch.setitem(QUANTIZERS, made.name, PolicyQuantizer(2, 8))
    return made


def test_a_supernet_is_trained_and_its_subnets_are_kept(scheme, few, tmp_path):
    torch.manual_seed(0)
    start, recipe = DynamicProxylessNASNets(space=DIGITS), RECIPES["tiny-qfa"]
    check_start(start, DIGITS, scheme)
    check_recipe(recipe, scheme, from_scratch=False)
    net = first_supernet(DIGITS, scheme, start, few, 64, CPU)
    assert all(quantizer.started for quantizer in quantizers(net))
    phase, rng = recipe.phases[0], np.random.default_rng(0)
    training = Training(net, TrainConfig(epochs=1, lr=0.05), CPU)
    ranges = {group["name"]: group["params"] for group in training.optimizer.param_groups}["ranges"]
    assert {id(p) for p in ranges} == {id(p) for name, p in net.named_parameters() if name.endswith(".clip")}
    before = [clip.item() for clip in ranges]
    train_one_epoch(training, make_loader(few.train, 64), 0, lambda: draw_subnets(net, phase, rng))
    assert [clip.item() for clip in ranges] != before
    save_supernet(tmp_path / "s.pt", net, recipe.name, {})
    again, _ = load_quantized_supernet(tmp_path / "s.pt", DIGITS)
    assert again.scheme == scheme

    learned = net.blocks[0].depthwise.conv.act_quant.clip.item()
    subnet = smallest_subnet(DIGITS)
    alone = quantized_subnet(net, subnet, few, 64, CPU).eval()
    assert alone.blocks[0].depthwise.conv.act_quant.clip.item() == learned  # what is learned is not calibrated anew
    save_subnet(tmp_path / "n.pt", DIGITS, subnet, alone.state_dict(), scheme=scheme)
    loaded, _, found = load_subnet(tmp_path / "n.pt")
    assert found == subnet
    with torch.no_grad():
        assert torch.equal(loaded.eval()(few.val.images), alone(few.val.images))
    layer = loaded.classifier
    scale, zero_point = layer.act_quant.scale_and_zero_point()
    values = layer.act_quant(torch.linspace(-1, 3, 50))
    torch.testing.assert_close(values, ((values / scale + zero_point).round() - zero_point) * scale)


def test_a_policy_uses_it_by_name(scheme, few, tmp_path):
    spec = named_model("mobilenet_v1_small", "digits")
    net = build_model(spec)
    layers = traced_layers(net, 32, in_channels=1)
    names = layer_names(layers)
    policy = policy_from_strategy(scheme.name, layers, [[8, -1], *([4, 3] for _ in names[1:])])
    config = TrainConfig(epochs=1, lr=0.01, batch_size=32)
    short = ShortFinetune(train=config, side=32, train_images=64, val_images=50)
    scorer = PolicyScorer(build_model(spec), names, scheme.name, short, Session(splits=few, device=CPU))
    assert scorer.accuracy(policy) == scorer.accuracy(policy)
    signed = quantized_model(net, policy, few, 32, 64, CPU)
    assert all(isinstance(layer.weight_quant, LearnedClip) for layer in quantized_layers(net).values())
    save_policy_model(tmp_path / "p.pt", spec, policy, layers, signed, net.state_dict())
    loaded = load_policy_model(tmp_path / "p.pt")[0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(few.val.images), net.eval()(few.val.images))


class Levels(Quantizer):
    """Rounds activations to a table of up to 2^bits of their quantiles, whose length depends on them."""

    data_dependent = ("levels",)

    def __init__(self, signed):
        super().__init__(signed)
        self.register_buffer("levels", torch.zeros(0))

    def quantize(self, v):
        return self.levels[(v[..., None] - self.levels).abs().argmin(dim=-1)]

    def calibrate(self, v):
        quantiles = torch.quantile(v.flatten()[:1000], torch.linspace(0, 1, 2**self.bits))
        self.levels = torch.cat([self.levels, quantiles]).unique()

    def forget(self):
        self.levels = self.levels.new_zeros(0)

    def scale_and_zero_point(self, v=None):
        raise UserError("levels have no scale")

    def check_state(self, state, shape):
        assert shape is None  # activations have no shape of their own
        if len(state.get("levels", ())) == 0:
            raise UserError(f"layer {self.label} has no levels")

    def _load_from_state_dict(self, state, prefix, *args):
        self.levels = torch.zeros_like(state[prefix + "levels"])
        super()._load_from_state_dict(state, prefix, *args)


def test_files_of_policies_have_tensors_that_depend_on_data(monkeypatch, few, tmp_path):
    """Of both operands, also inside a quantizer for each bit-width."""
    clusters = QuantScheme("levels", weight=lambda: PerBits(KMeansWeightQuantizer, choices=(2, 3)), activation=Levels)
    monkeypatch.setitem(SCHEMES, clusters.name, clusters)
    monkeypatch.setitem(QUANTIZERS, clusters.name, PolicyQuantizer(2, 8))
    spec, file = named_model("mobilenet_v1_small", "digits"), tmp_path / "p.pt"
    net = build_model(spec)
    layers = traced_layers(net, 32, in_channels=1)
    policy = policy_from_strategy(clusters.name, layers, [[3, -1], *([2, 3] for _ in layer_names(layers)[1:])])
    signed = quantized_model(net, policy, few, 32, 64, CPU)

    def saved(state):
        save_policy_model(file, spec, policy, layers, signed, state)
        return load_policy_model(file).net.eval()

    state = net.state_dict()
    with torch.no_grad():
        assert torch.equal(saved(state)(few.val.images[:20]), net.eval()(few.val.images[:20]))
    levels, labels = "classifier.act_quant.levels", "classifier.weight_quant.of_bits.2.labels"
    for key, value, message in (
        (levels, torch.zeros(0), "p.pt: layer classifier has no levels"),
        (labels, state[labels][:1], "p.pt: the clusters of layer classifier do not fit"),
        (labels.replace("2", "3"), None, "p.pt: layer classifier lacks its clusters"),
    ):
        broken = {name: tensor for name, tensor in {**state, key: value}.items() if tensor is not None}
        with pytest.raises(UserError, match=message):
            saved(broken)


def test_the_facts_of_a_scheme_decide_what_it_trains():
    added = QuantScheme("added", weight=LearnedClip)
    with pytest.raises(UserError, match="not trained with added"):
        check_start(None, DIGITS, added)
    assert not added.trains_supernets
    assert not LINEAR.trains_supernets
