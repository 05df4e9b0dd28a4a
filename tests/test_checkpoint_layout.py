"""Published checkpoints: keys, shapes, and the logits of networks with their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import filled

from apq.errors import UserError
from apq.genes import sample, subnets_of
from apq.presets import APQ_IMAGENET, DIGITS, published_space
from apq.subnet import architecture_of, policy_of
from elastic_nn.modules.quant_layers import quantizers, quantizers_off
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.networks.checkpoint_layout import from_published, to_published
from elastic_nn.networks.layout import ROLES

PUBLISHED = {
    "n_classes": 1000,
    "bn_param": (0.1, 1e-3),
    "dropout_rate": 0,
    "base_stage_width": "proxyless",
    "width_mult_list": 1.0,
    "ks_list": [3, 5, 7],
    "expand_ratio_list": [4, 6],
    "depth_list": [2, 3, 4],
}
ARCHITECTURE = ("wid", "ks", "e", "d")


def load(golden, name, kind):
    data = golden(name)
    weights = filled(data["state_dict"], data["SEED"])
    for check in data["fill_check"]:
        value = weights[check["key"]].flatten()
        assert value[:3].tolist() == check["first3"]
        assert value.double().sum().item() == pytest.approx(check["sum_float64"], abs=1e-9)
    net = kind(**PUBLISHED)
    net.load_weights_from_proxylessnas(weights)
    return data, weights, net.eval()


def choose(net, spec):
    net.set_active_subnet(**{key: spec[key] for key in ARCHITECTURE})
    policy = {key: value for key, value in spec.items() if key not in ARCHITECTURE}
    if policy and quantizers(net):
        net.set_quantization_policy(**policy)


def check(logits, expected, **tolerance):
    np.testing.assert_allclose(logits[:, :10], expected["first10"], **tolerance)
    np.testing.assert_allclose(logits.mean(1), expected["mean"], **tolerance)
    np.testing.assert_allclose(logits.std(1, unbiased=False), expected["std"], **tolerance)


IMAGES = torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, 224, 224)).astype(np.float32))


@torch.no_grad()
def test_quantized_supernet(golden):
    data, weights, net = load(golden, "apq_network.json", DynamicQuantizedProxylessNASNets)
    written = net.published_state_dict()
    assert [[key, list(value.shape)] for key, value in written.items()] == data["state_dict"]
    unused = "first_conv.conv.activation_range"
    assert all(torch.equal(written[key], weights[key]) for key in weights if key != unused)
    for record in data["evaluations"]:
        choose(net, record["spec"])
        net.float()
        logits = net(IMAGES)
        check(logits, record["quantized_float32"], atol=0.6)  # roundings flip: float32 is a matter of luck
        assert (
            torch.corrcoef(torch.stack([logits[0, :10], torch.tensor(record["quantized_float32"]["first10"][0])]))[0, 1]
            > 0.9
        )
        with quantizers_off(net):
            check(net(IMAGES), record["unquantized_float32"], rtol=1e-3, atol=1e-4)
        net.double()
        check(net(IMAGES.double()), record["quantized_float64"], atol=1e-6, rtol=0)
        assert net(IMAGES.double()).argmax(1).tolist() == record["quantized_float64"]["argmax"]
        alone = net.get_active_subnet()
        check(alone(IMAGES.double()), record["quantized_float64"], atol=1e-6, rtol=0)  # its ranges came along
        with quantizers_off(net):
            check(net(IMAGES.double()), record["unquantized_float64"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_every_layer_of_the_quantized_supernet(golden):
    """Output of each block in float64; bits and weight range of each layer."""
    data, _, net = load(golden, "apq_network.json", DynamicQuantizedProxylessNASNets)
    net.double()
    for record in data["evaluations"]:
        choose(net, record["spec"])
        outputs = {}
        units = {"first_conv": net.first_conv, "feature_mix_layer": net.feature_mix_layer}
        units |= {i: net.blocks[i] for i in net.active_blocks}
        hooks = [
            unit.register_forward_hook(lambda unit, args, out, name=name, into=outputs: into.__setitem__(name, out))
            for name, unit in units.items()
        ]
        net(IMAGES.double())
        for hook in hooks:
            hook.remove()
        assert set(outputs) == {name for name, *_ in record["block_outputs_float64"]}
        for name, mean, std, shape in record["block_outputs_float64"]:
            assert list(outputs[name].shape) == shape
            assert [outputs[name].mean().item(), outputs[name].std().item()] == pytest.approx([mean, std], abs=1e-9)
        for name, weight_range, w_bits, _, magnitude_bits, half_wave in record.get("layer_state_after_eval") or []:
            parts = name.split(".")
            if weight_range < 0:  # never ran
                assert int(parts[1]) not in net.active_blocks
                continue
            if parts[0] == "blocks":
                role = {published: ours for ours, published in ROLES.items()}[parts[3]]
                block = net.blocks[int(parts[1])]
                layer = block.layers()[role].conv
                channels = layer.weight.size(1) if role == "expand" else block.depthwise.conv.active_out
            else:
                layer = net.classifier if parts[0] == "classifier" else getattr(net, parts[0]).conv
                channels = layer.weight.size(1)
            assert layer.active_weight(channels).abs().max().item() == pytest.approx(weight_range, rel=1e-6)
            assert layer.weight_quant.bits == w_bits
            if name != "first_conv.conv":  # its input is not quantized
                assert layer.act_quant.signed == (not half_wave)
                assert layer.act_quant.bits - layer.act_quant.signed == magnitude_bits


@torch.no_grad()
def test_float_supernet(golden):
    data, weights, net = load(golden, "apq_network_fp.json", DynamicProxylessNASNets)
    written = net.published_state_dict()
    assert [[key, list(value.shape)] for key, value in written.items()] == data["state_dict"]
    assert all(torch.equal(written[key], weights[key]) for key in weights)
    for record in data["evaluations"]:
        choose(net, record["arch"])
        check(net.float()(IMAGES), record["float32"], rtol=1e-3, atol=1e-4)
        check(net.double()(IMAGES.double()), record["float64"], atol=1e-6, rtol=0)


def test_defaults_are_the_published_space():
    assert DynamicProxylessNASNets().space == APQ_IMAGENET == published_space()
    half = DynamicProxylessNASNets(10, width_mult_list=[0.5], ks_list=3, expand_ratio_list=6, depth_list=2).space
    assert [stage.width for stage in half.stages] == [16, 24, 40, 48, 96, 160]
    assert (half.stem_width, half.head_width, half.kernel_sizes, half.ratios) == (16, 1280, (3,), (6.0,))
    assert half.name != APQ_IMAGENET.name
    with pytest.raises(UserError, match="proxyless, google"):
        DynamicProxylessNASNets(base_stage_width="apple")
    with pytest.raises(UserError, match="not searched"):
        DynamicProxylessNASNets(width_mult_list=[0.5, 1.0])
    net = DynamicProxylessNASNets(bn_param=(0.2, 1e-5), dropout_rate=0.3, n_classes=5).get_active_subnet()
    assert (net.dropout.p, net.blocks[3].expand.norm.eps, net.first_conv.norm.momentum) == (0.3, 1e-5, 0.2)


@pytest.mark.parametrize("elastic", [True, False])
def test_layout_goes_there_and_back(elastic):
    net = DynamicQuantizedProxylessNASNets(space=DIGITS)
    net.sample_active_subnet(np.random.default_rng(0))
    source = net if elastic else net.get_active_subnet()
    written = to_published(source, elastic=elastic)
    assert ("blocks.1.mobile_inverted_conv.depth_conv.conv.conv.weight" in written) == elastic
    back = from_published({f"module.{key}": value for key, value in written.items()}, source, elastic=elastic)
    assert all(torch.equal(back[key], value) for key, value in source.state_dict().items())
    assert set(back) == set(source.state_dict())


def test_odd_checkpoints_name_their_keys_and_change_nothing():
    net = DynamicQuantizedProxylessNASNets(space=DIGITS)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    good = {key: value + 1 for key, value in net.published_state_dict().items()}
    missing = {key: value for key, value in good.items() if not key.startswith("blocks.2.")}
    n = len(good) - len(missing)
    cases = [
        (missing, rf"{n} missing \(blocks.2.mobile_inverted_conv.inverted_bottleneck.*, \.\.\.\)"),
        ({**good, "extra.key": torch.zeros(1)}, r"1 extra \(extra.key\)"),
        ({**good, "classifier.linear.bias": torch.zeros(3)}, r"1 of another shape \(classifier.linear.bias \(3,\) for"),
        ({**good, "classifier.linear.bias": "text"}, r"real numbers only, not classifier.linear.bias"),
        ({**good, "classifier.linear.bias": torch.zeros(10) * 1j}, r"real numbers only"),
        ({**good, "classifier.linear.bias": torch.full((10,), torch.nan)}, r"1 not finite \(classifier.linear.bias\)"),
        ({**good, "first_conv.conv.activation_range": torch.ones(7, 7)}, r"1 of another shape \(first_conv.conv.act"),
        ({**good, "module.classifier.linear.bias": torch.zeros(10)}, "keys twice"),
        ({0: torch.zeros(1)}, "missing"),
    ]
    for state, match in cases:
        with pytest.raises(UserError, match=match):
            net.load_weights_from_proxylessnas(state)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.load_weights_from_proxylessnas(good)
    assert not torch.equal(net.classifier.bias, before["classifier.bias"])


def test_float_weights_leave_ranges_alone():
    net = DynamicQuantizedProxylessNASNets(space=DIGITS)
    net.classifier.act_quant.range.data.fill_(3.0)
    net.load_weights_from_proxylessnas(DynamicProxylessNASNets(space=DIGITS).published_state_dict())
    assert net.classifier.act_quant.range.item() == 3.0


def test_calls_in_any_order():
    """A policy is kept for idle slots. Where it forbids a new kernel, it is ignored until the next policy."""
    net, rng = DynamicQuantizedProxylessNASNets(space=DIGITS), np.random.default_rng(0)
    for subnet in subnets_of(DIGITS, sample(DIGITS, 30, rng)):
        architecture, policy = architecture_of(DIGITS, subnet), policy_of(DIGITS, subnet)
        net.set_active_subnet(**architecture)
        net.set_quantization_policy(**policy)
        assert net.active == subnet
    low = {kind.setting: [4] * len(DIGITS.slots) for kind in DIGITS.operands}
    net.set_active_subnet(ks=3, e=1, d=1)
    net.set_quantization_policy(**low)
    net.set_active_subnet(d=[3, 3, 2])
    assert all(set(row) == {4} for row in net.active.bits)
    net.set_active_subnet(ks=7)
    assert [set(row) for row in net.active.bits] == [{4}, {4}, {4}, {8}]
    net.set_active_subnet(ks=5)
    assert all(set(row) == {4} for row in net.active.bits)
    with pytest.raises(UserError, match="7x7"):
        net.set_quantization_policy(**low) or net.set_active_subnet(ks=7) or net.set_quantization_policy(**low)
