"""Supernets, slicing, kernel transforms, extraction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apq.errors import UserError
from apq.genes import largest_subnet, sample, smallest_subnet, subnets_of
from apq.layers import layers_of
from apq.presets import APQ_IMAGENET, DIGITS, SPACES
from apq.subnet import architecture_of, policy_of
from elastic_nn.modules.elastic_conv import ElasticConv2d
from elastic_nn.modules.quant_layers import quantized_layers, quantizers_off
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.networks.subnet_file import load_subnet, save_subnet
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet, save_supernet
from elastic_nn.quantizers import FLOAT
from elastic_nn.training.calibration import calibrate_ranges

SMALL_IMAGENET = replace(APQ_IMAGENET, name="small", resolutions=(32,), n_classes=7)


def lively(net, seed=0):
    """Draw random statistics, transforms and ranges, so that tests notice any that are not copied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith(("running_var", "norm.weight")):
                tensor.copy_(0.5 + noise)
            elif name.endswith(("running_mean", "norm.bias")):
                tensor.copy_(0.2 * noise - 0.1)
            elif "kernel_transforms" in name:
                tensor.add_(0.05 * noise)
            elif name.endswith(".step"):
                tensor.copy_(0.1 + 0.2 * noise)
            elif name.endswith("act_quant.range"):
                tensor.copy_(2 + 4 * noise)
            elif name.endswith("weight_quant.range"):
                tensor.copy_(0.3 + noise)
    return net.eval()


def images(space, n=2):
    return torch.rand(n, space.in_channels, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("space", [DIGITS, SMALL_IMAGENET], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", [DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets])
@torch.no_grad()
def test_extracted_subnet_equals_supernet(space, kind):
    torch.manual_seed(0)
    net, rng = lively(kind(space=space)), np.random.default_rng(0)
    x = images(space)
    for _ in range(5):
        net.sample_active_subnet(rng)
        torch.testing.assert_close(net.get_active_subnet()(x), net(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_outputs_do_not_depend_on_earlier_subnets():
    net, rng = lively(DynamicQuantizedProxylessNASNets(space=DIGITS)), np.random.default_rng(1)
    subnets, x = subnets_of(DIGITS, sample(DIGITS, 4, rng)), images(DIGITS)

    def outputs(order):
        found = {}
        for i in order:
            net.activate(subnets[i])
            found[i] = net(x)
        return found

    forward, backward = outputs([0, 1, 2, 3]), outputs([3, 2, 1, 0])
    assert all(torch.equal(forward[i], backward[i]) for i in range(4))


@torch.no_grad()
def test_bits_matter_and_float_weights_load():
    net = lively(DynamicQuantizedProxylessNASNets(space=DIGITS))
    x, outputs = images(DIGITS), {}
    for bits in (4, 6, 8):
        policy = {kind.setting: [bits] * len(DIGITS.slots) for kind in DIGITS.operands}
        net.set_active_subnet(ks=[5] * 8, e=[slot.ratios[-1] for slot in DIGITS.slots], d=[3, 3, 2])
        net.set_quantization_policy(**policy)
        outputs[bits] = net(x)
    errors = {bits: (outputs[bits] - outputs[8]).abs().mean().item() for bits in (4, 6)}
    assert errors[4] > errors[6] > 0

    source = lively(DynamicProxylessNASNets(space=DIGITS), seed=3)
    net.load_float_weights(source.state_dict())
    source.activate(net.active)
    with quantizers_off(net):
        torch.testing.assert_close(net(x), source(x))
    with pytest.raises(UserError, match="float supernet"):
        net.load_float_weights({"nonsense": torch.zeros(1)})


@pytest.mark.parametrize("name", SPACES)
def test_network_runs_the_layers_that_are_priced(name):
    """The weights of the extracted network are those of `layers_of`, layer by layer."""
    space = SPACES[name]
    net = DynamicProxylessNASNets(space=space)
    for subnet in (
        largest_subnet(space),
        smallest_subnet(space),
        *subnets_of(space, sample(space, 2, np.random.default_rng(2))),
    ):
        net.activate(subnet)
        alone = net.get_active_subnet()
        listed = layers_of(space, subnet)
        assert [layer.weight.numel() for layer in quantized_layers(alone).values()] == [
            layer.weights for layer in listed if ".squeeze." not in layer.name
        ]
        assert sum(p.numel() for p in alone.parameters()) == sum(layer.params for layer in listed)


def test_kernel_transform_is_centre_times_matrix():
    torch.manual_seed(0)
    conv = ElasticConv2d(4, 4, (3, 5, 7), 1, FLOAT, depthwise=True)
    with torch.no_grad():
        for matrix in conv.kernel_transforms.values():
            matrix.add_(0.1 * torch.randn_like(matrix))
    w, m = conv.weight, conv.kernel_transforms
    five = (w[:, 0, 1:6, 1:6].reshape(4, 25) @ m["7to5"].T).reshape(4, 5, 5)
    three = (five[:, 1:4, 1:4].reshape(4, 9) @ m["5to3"].T).reshape(4, 3, 3)
    for kernel, expected in ((7, w[:, 0]), (5, five), (3, three)):
        conv.active_kernel = kernel
        torch.testing.assert_close(conv.active_weight(4)[:, 0], expected)
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(conv(x), F.conv2d(x, three[:3, None], padding=1, groups=3))


@torch.no_grad()
def test_sorting_channels_keeps_the_largest_network():
    net, x = lively(DynamicProxylessNASNets(space=DIGITS)), images(DIGITS)
    before = net(x)
    for block in net.blocks[1:]:
        block.sort_channels()
        importance = block.project.conv.weight.abs().sum((0, 2, 3))
        assert torch.all(importance[:-1] >= importance[1:])
    torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-4)


def test_published_calls_check_their_arguments():
    net = DynamicQuantizedProxylessNASNets(space=DIGITS)
    net.set_active_subnet(**architecture_of(DIGITS, smallest_subnet(DIGITS)))
    net.set_quantization_policy(**policy_of(DIGITS, smallest_subnet(DIGITS)))
    assert net.active == smallest_subnet(DIGITS)
    with pytest.raises(UserError, match="ks"):
        net.set_active_subnet(**{**architecture_of(DIGITS, net.active), "ks": [3]})
    with pytest.raises(UserError, match="color"):
        net.set_quantization_policy(**policy_of(DIGITS, net.active), color=[8] * 8)
    assert net.active == smallest_subnet(DIGITS)


@torch.no_grad()
def test_calibration_follows_the_inputs():
    net = lively(DynamicQuantizedProxylessNASNets(space=DIGITS))
    net.activate(smallest_subnet(DIGITS))
    alone, x = net.get_active_subnet(), images(DIGITS, 8)
    calibrate_ranges(alone, x)
    eight_bit = alone.feature_mix_layer.conv.act_quant
    assert 0 < eight_bit.range.item() <= 6
    assert alone.blocks[1].expand.conv.weight_quant.calibrated  # 4 bits: a threshold
    assert not alone.feature_mix_layer.conv.weight_quant.calibrated  # 8 bits: follows the largest weight
    again = net.get_active_subnet()
    calibrate_ranges(again, x)
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), again.state_dict().values(), strict=True))


def test_files_of_networks(tmp_path):
    net = lively(DynamicProxylessNASNets(space=DIGITS))
    save_supernet(tmp_path / "s.pt", net, "tiny", {"dataset": "digits"}, seed=0)
    with torch.no_grad():
        loaded, origin = load_supernet(tmp_path / "s.pt")
        assert (origin.recipe, origin.images) == ("tiny", {"dataset": "digits"})
        assert torch.equal(loaded.eval()(images(DIGITS)), net(images(DIGITS)))
    quantized = load_quantized_supernet(tmp_path / "s.pt", DIGITS)[0].eval()
    quantized.activate(smallest_subnet(DIGITS))
    alone = quantized.get_active_subnet()
    save_subnet(tmp_path / "n.pt", DIGITS, quantized.active, alone.state_dict(), epoch=3)
    loaded, space, subnet = load_subnet(tmp_path / "n.pt")
    assert (space, subnet) == (DIGITS, quantized.active)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images(DIGITS)), alone(images(DIGITS)))
    with pytest.raises(UserError, match="not of small"):
        load_quantized_supernet(tmp_path / "s.pt", SMALL_IMAGENET)
    save_subnet(tmp_path / "bad.pt", DIGITS, largest_subnet(DIGITS), alone.state_dict())
    with pytest.raises(UserError, match="do not fit"):
        load_subnet(tmp_path / "bad.pt")
