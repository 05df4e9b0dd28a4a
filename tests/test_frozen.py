"""Networks as constants: codes give the weights back, whole numbers give the logits, streams of bits give the codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported_networks import SPACES, images_of, network, odd
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apq.errors import UserError
from apq.genes import largest_subnet, sample, subnets_of
from apq.layers import layers_of
from apq.presets import DIGITS
from elastic_nn.modules.quant_layers import QuantConv2d, quantized_layers
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.networks.quantize_model import quantize_model
from elastic_nn.quantizers import KMEANS, LINEAR, LSQ, scheme_named
from elastic_nn.training.calibration import calibrate_ranges
from export.frozen import FrozenLayer, Weights, freeze, freeze_weights
from export.graph import Graph, Norm, fold, folded
from export.operations import OPERATIONS
from export.packed import pack, packed_data, payload_bytes, read_packed, unpack
from export.run import accumulator, run_as_trained, run_exactly, sums_of_codes
from export.trace import trace

MODEL = "mobilenet_v2_small"


def quantized_model(scheme, bits=4):
    """A named network with quantizers on every layer."""
    torch.manual_seed(0)
    spec = named_model(MODEL)
    net = build_model(spec).eval()
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    images = images_of(DIGITS, spec.resolution, 8)
    odd(net, images)
    quantize_model(net, names, scheme, dict.fromkeys(names, True))
    for layer in quantized_layers(net).values():
        layer.set_bits(bits, 8)
    calibrate_ranges(net, images)
    return net, images


@pytest.mark.parametrize("name", SPACES)
def test_constants_compute_what_the_network_computes_to_the_bit(name):
    net, images = network(name)
    graph = trace(net, tuple(images.shape[1:]))
    with torch.no_grad():
        assert torch.equal(run_as_trained(graph, images), net(images))
    assert all(layer.weights.values().dtype == torch.float32 for layer in graph.layers.values())
    assert any(layer.whole for layer in graph.layers.values())


@pytest.mark.parametrize("scheme", [LINEAR, KMEANS], ids=lambda scheme: scheme.name)
def test_networks_of_torchvision_too(scheme):
    net, images = quantized_model(scheme)
    with torch.no_grad():
        assert torch.equal(run_as_trained(trace(net, tuple(images.shape[1:])), images), net(images))


@pytest.mark.parametrize("name", SPACES)
def test_whole_numbers_give_the_logits(name):
    """In float64 the network rounds as the exact form does, but for values at the very edge between two codes."""
    net, images = network(name)
    exact = run_exactly(folded(trace(net, tuple(images.shape[1:]))), images)
    with torch.no_grad():
        logits = net(images)
    off = (exact - logits).abs().amax(1) > 1e-3 * logits.std()
    assert off.float().mean() <= 0.25  # images in which a value lay at an edge
    assert torch.equal(exact.argmax(1)[~off], logits.argmax(1)[~off])


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_lowest_code_of_learned_steps_is_kept(bits):
    """LSQ has a code more below zero than above, which cannot change its sign with a negative gamma."""
    layer = nn.Conv2d(1, 1, 1, bias=False)
    quantizer = scheme_named("lsq").weight()
    quantizer.bits = bits
    with torch.no_grad():
        quantizer.step.fill_(0.5)
        lowest = -(2 ** (bits - 1))
        values = torch.tensor([lowest * 0.5 - 3, 0.24, 0.26, 1e3]).view(1, 1, 2, 2)
    weights = freeze_weights("layer", values, quantizer)
    assert weights.codes.flatten().tolist() == [lowest, 0, 1, -lowest - 1]
    negative = Norm(mean=torch.zeros(1), variance=torch.ones(1), weight=-torch.ones(1), bias=torch.zeros(1), eps=0.0)
    own = fold(FrozenLayer(weights=weights, inputs=None, bias=None), negative)
    assert own.multiplier.tolist() == [-0.5]
    assert own.weights.codes.min() == lowest
    assert layer.bias is None


def test_codes_that_are_no_multiples_are_refused():
    class Odd(type(scheme_named("lsq").weight())):
        def quantize(self, v):
            return super().quantize(v) + 0.1

    quantizer = Odd(signed=True)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    with pytest.raises(UserError, match="the weights of here at 8 bits are not whole numbers of steps"):
        freeze_weights("here", torch.tensor([1.0, 2.0]), quantizer)


def test_sums_are_those_of_integers():
    """Against torch's own convolution of 64-bit integers, with stride, padding, groups and a zero point."""
    layer = QuantConv2d(6, 9, 3, stride=2, padding=1, groups=3, bias=False, scheme=LSQ)
    layer.set_bits(8, 8)
    x = torch.rand(2, 6, 7, 7) * 4
    layer.weight_quant.calibrate(layer.weight)
    layer.act_quant.calibrate(x)
    own = freeze("layer", layer, 6)
    shifted = replace(
        own, inputs=replace(own.inputs, rounding=own.inputs.rounding._replace(zero_point=torch.full((1,), 3.0)))
    )
    for one, zero in ((own, 0), (shifted, 3)):
        codes = one.inputs.codes(x)
        unfolded = F.unfold((codes - zero).double(), 3, padding=1, stride=2).long().view(2, 3, 18, 16)
        matrix = one.weights.codes.view(3, 3, 18)
        expected = (matrix[None] @ unfolded).view(2, 9, 4, 4)
        assert torch.equal(sums_of_codes(one, codes).long(), expected)


def test_accumulators_are_exact():
    """At 2^24 float32 has gaps: the worst case of each layer decides."""
    net, _ = network("lsq")
    inputs = next(layer.inputs for layer in trace(net, (1, 32, 32)).layers.values() if layer.inputs is not None)
    inputs = replace(inputs, lowest=0, highest=255)
    for n, dtype in ((518, torch.float32), (519, torch.float64)):  # 518 * 255 * 127 = 16,775,430 < 2^24 = 16,777,216
        weights = Weights(bits=8, codes=torch.full((1, n, 1, 1), 127), step=torch.ones(1))
        layer = FrozenLayer(weights=weights, inputs=inputs, bias=None)
        assert layer.largest_sum() == n * 255 * 127
        assert accumulator(layer) == dtype


def test_padding_is_zero_where_an_offset_moves_the_codes():
    """With an offset, no code stands for the zero of padding. The bias of each place makes up for it."""
    net, images = network("batchquant")
    graph = folded(trace(net, tuple(images.shape[1:])))
    padded = {name: layer for name, layer in graph.layers.items() if layer.whole and layer.padding != (0, 0)}
    assert padded
    assert all(abs(layer.inputs.offset) > 0.01 for layer in padded.values())
    name, layer = next(iter(padded.items()))
    channels = layer.weights.codes.size(0)
    x = torch.rand(2, channels, 6, 6) * 3
    one = Graph(
        image_shape=(channels, 6, 6),
        nodes=tuple(replace(node, inputs=("image",)) for node in graph.nodes if node.name == name),
    )
    codes = layer.inputs.codes(x)
    values = layer.run(layer.inputs.values(codes).double(), layer.weights.values().double())
    own = layer.multiplier.double() / (layer.weights.step.double() * layer.inputs.step)
    expected = values * own.view(-1, 1, 1) + layer.bias.double().view(-1, 1, 1)
    assert (run_exactly(one, x) - expected).abs().max() < 1e-5


def test_a_norm_that_follows_something_else_is_a_scale():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.after = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(self.norm(x))
            return (y + self.after(y)).mean((2, 3))  # a norm of what is read elsewhere too

    torch.manual_seed(0)
    net = Odd().eval()
    x = torch.randn(3, 2, 5, 5)
    odd(net, x)
    graph = trace(net, (2, 5, 5))
    with torch.no_grad():
        assert torch.equal(run_as_trained(graph, x), net(x))
        assert (run_exactly(folded(graph), x) - net(x)).abs().max() < 1e-5
    assert [node.op for node in folded(graph).nodes] == ["scale", "layer", "scale", "add", "mean"]


def test_what_cannot_be_exported_is_named():
    class Sorts(nn.Module):
        def forward(self, x):
            return x.sort().values

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"operation sort \(sort\) cannot be exported"):
        trace(Sorts(), (1, 4, 4))
    with pytest.raises(UserError, match="a Branches cannot be exported: "):
        trace(Branches(), (1, 4, 4))
    with pytest.raises(UserError, match="module 0 is a LSTM, which cannot be exported"):
        trace(nn.Sequential(nn.LSTM(4, 4)), (1, 4))
    with pytest.raises(UserError, match="norm 0 has no statistics"):
        trace(nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)).eval(), (1, 4, 4))
    with pytest.raises(UserError, match="layer 0 pads by reflect"):
        trace(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), (1, 4, 4))


@given(st.integers(1, 8), st.lists(st.integers(-128, 255), max_size=40), st.booleans())
def test_streams_of_bits_give_the_codes_back(bits, numbers, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    codes = np.clip(numbers, low, high).astype(np.int64)
    stream = pack(codes, bits)
    assert len(stream) == -(-bits * len(codes) // 8)
    assert unpack(stream, bits, len(codes), signed=signed).tolist() == codes.tolist()
    # The same number, written as one large integer
    whole = sum((int(code) % 2**bits) << (bits * i) for i, code in enumerate(codes))
    assert int.from_bytes(stream.tobytes(), "little") == whole


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="codes from 0 to 16 do not fit 4 bits"):
        pack(np.array([0, 16]), 4)


@pytest.mark.parametrize("name", SPACES)
def test_a_packed_file_is_the_network(name, tmp_path):
    pytest.importorskip("safetensors")
    net, images = network(name)
    graph = folded(trace(net, tuple(images.shape[1:])))
    file = tmp_path / "net.safetensors"
    file.write_bytes(packed_data(graph, {"space": "made up"}))
    again = read_packed(file)
    assert file.stat().st_size > payload_bytes(graph)
    assert torch.equal(run_exactly(again, images), run_exactly(graph, images))
    for own, other in zip(graph.layers.values(), again.layers.values(), strict=True):
        assert torch.equal(own.weights.codes, other.weights.codes)


@pytest.mark.parametrize("name", SPACES)
def test_the_claimed_size_is_that_of_the_packed_file_to_the_byte(name):
    space, _ = SPACES[name]
    net, images = network(name)
    (subnet,) = subnets_of(space, sample(space, 1, np.random.default_rng(3)))
    claimed = sum(layer.size_bytes for layer in layers_of(space, subnet))
    assert payload_bytes(folded(trace(net, tuple(images.shape[1:])))) == claimed


def test_sizes_of_a_layer_by_hand():
    """12 channels from 7, 3x3, at 3 bits: 756 weights in 283.5 bytes, so 284; 12 multipliers and 12 biases of 4."""
    layer = layers_of(DIGITS, largest_subnet(DIGITS))[0]
    one = replace(layer, in_channels=7, out_channels=12, kernel_size=3, groups=1, w_bits=3, norm=True, bias=False)
    assert (one.size_bytes, one.published_size_bytes) == (284 + 96, 283.5 + 48)
    assert replace(one, norm=False, bias=True).size_bytes == 284 + 48
    assert replace(one, norm=False, bias=False).size_bytes == 284


def test_damaged_packed_files_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    net, images = network("linear")
    file = tmp_path / "net.safetensors"
    file.write_bytes(packed_data(folded(trace(net, tuple(images.shape[1:]))), {}))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="is not a packed network"):
        read_packed(file)
    save_file({"a": np.zeros(3)}, str(file))
    with pytest.raises(UserError, match="is not a packed network"):
        read_packed(file)
    save_file(
        {"a": np.zeros(3)}, str(file), metadata={"apq": '{"version": 1, "image": [1, 8, 8], "nodes": [{"op": "x"}]}'}
    )
    with pytest.raises(UserError, match="is damaged"):
        read_packed(file)


def test_every_operation_is_exact_in_float64_terms():
    """The exact form of each operation is the network's own, to float32 rounding."""
    x = torch.linspace(-8, 8, 2 * 3 * 6 * 6).view(2, 3, 6, 6)
    pool = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "ceil_mode": False, "count_include_pad": True}
    scale = {"multiplier": torch.tensor([1.0, -2.0, 3.0]), "bias": torch.tensor([0.5, 0.0, 1.0])}
    settings = {
        "mean": {"keepdim": True},
        "max_pool": pool,
        "average_pool": pool,
        "scale": scale,
        "pad": {"pads": (0, 1, 2, 3)},
    }
    for name, operation in OPERATIONS.items():
        values = (x, x / 2) if name in ("add", "mul", "concat") else (x,)
        own, exact = operation.run(settings.get(name, {}), *values), operation.exact(settings.get(name, {}), *values)
        assert exact.dtype == torch.float32
        assert torch.allclose(own, exact, rtol=1e-5, atol=1e-6), name
