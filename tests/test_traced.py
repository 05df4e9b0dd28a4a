"""Networks traced into layers: well-known counts, unusual modules, and the command that prints costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from example_results import write_found
from example_spaces import ALL as SPACES
from torch import nn

from apq.errors import UserError
from apq.genes import largest_subnet, sample, subnets_of
from apq.layers import ConvLayer, layers_of
from apq.presets import APQ_IMAGENET, DIGITS, QFA_MBV3
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from lut.__main__ import main
from lut.accelerator import Accelerator
from lut.bitfusion import BitFusion
from lut.costs import cost_of, network_costs
from lut.named import network_named
from lut.traced import EmptyWeights, traced_layers
from utils.latency_predictor import LatencyPredictor

PUBLISHED = BitFusion()
BIASED = {"norm": False, "bias": True}


def printed(capsys, *flags):
    main([*flags, "--json"])
    return json.loads(capsys.readouterr().out)


# Known networks


def macs_by_hooks(net, resolution):
    """MACs counted independently of the trace, from the weights and outputs of the modules."""
    counts = []

    def count(module, args, output):
        positions = output.numel() // output.shape[1 if isinstance(module, nn.Conv2d) else -1]
        counts.append(module.weight.numel() * positions)

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, resolution, resolution, device="meta"))
    return sum(counts)


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("mobilenet_v2", 3_504_872, 0.301),
        ("resnet34", 21_797_672, 3.66),
        ("resnet50", 25_557_032, 4.09),
        ("resnext50_32x4d", 25_028_904, 4.23),  # grouped
        ("mobilenet_v3_large", 5_483_032, 0.217),  # squeeze-and-excite: biased 1x1 on a 1x1 map
        ("efficientnet_b0", 5_288_548, 0.386),
        ("regnet_y_400mf", 4_344_144, 0.402),  # finds its widths by tensor arithmetic
        ("vgg11_bn", 132_868_840, 7.61),  # bias and BatchNorm
        ("alexnet", 61_100_840, 0.714),  # valid padding
        ("squeezenet1_1", 1_235_496, 0.349),
    ],
)
def test_counts_of_known_networks(name, params, gmacs):
    network = network_named(name)
    cost = cost_of(network.layers["full"], PUBLISHED)
    with torch.device("cpu") if "regnet" in name else torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None).to("meta")
    assert cost.params == params == sum(p.numel() for p in net.parameters())
    assert network.unlisted_params == 0
    assert cost.macs == macs_by_hooks(net, 224) == pytest.approx(gmacs * 1e9, rel=2e-3)
    assert cost.bitops == 64 * cost.macs


def test_mobilenet_v2_costs_as_published():
    layers = network_named("mobilenet_v2").layers["full"]
    assert len(layers) == 53
    whole, without_classifier = cost_of(layers, PUBLISHED), cost_of(layers[:-1], PUBLISHED)
    assert [whole.latency_ms, whole.energy_mj] == pytest.approx([9.10, 12.46], abs=1e-2)
    assert [without_classifier.latency_ms, without_classifier.energy_mj] == pytest.approx([8.99, 12.28], abs=1e-2)
    assert [layer.image_input for layer in layers] == [True] + [False] * 52
    *normed, classifier = layers  # a folded norm has a multiplier and a bias a channel
    channels = 8 * sum(layer.out_channels for layer in normed) + 4 * classifier.out_channels
    assert whole.size_bytes == sum(layer.weights for layer in layers) + channels


def test_resolution_and_bits():
    at_8 = network_named("mobilenet_v2", resolution=96).layers["full"]
    at_4 = network_named("mobilenet_v2", (4, 6), 96).layers["full"]
    assert at_8[0].input_size == 96
    assert at_4 == [replace(layer, w_bits=4, a_bits=6) for layer in at_8]


def test_parameters_that_no_layer_holds_are_told():
    network = network_named("densenet121")  # its norms stand before the convolutions, on joined outputs
    cost = cost_of(network.layers["full"], PUBLISHED)
    assert cost.params + network.unlisted_params == 7_978_856
    assert 0 < network.unlisted_params < 0.01 * cost.params


# Our own networks


@pytest.mark.parametrize("network", [DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets])
@pytest.mark.parametrize("name", SPACES)
def test_own_network_runs_the_layers_of_its_subnet(name, network):
    space = SPACES[name]
    net = network(space=space)
    for subnet in (largest_subnet(space), *subnets_of(space, sample(space, 1, np.random.default_rng(3)))):
        net.activate(subnet)
        alone = net.get_active_subnet().to("meta")
        traced = traced_layers(alone, subnet.resolution, in_channels=space.in_channels)
        assert traced == [replace(layer, w_bits=8, a_bits=8) for layer in layers_of(space, subnet)]


def test_trace_changes_nothing():
    net = DynamicQuantizedProxylessNASNets(space=DIGITS)
    net.activate(largest_subnet(DIGITS))
    alone = net.get_active_subnet().train()
    alone.classifier.eval().bias.requires_grad_(False)
    before = {key: value.clone() for key, value in alone.state_dict().items()}
    traced_layers(alone, 32, in_channels=1)
    assert all(torch.equal(value, before[key]) for key, value in alone.state_dict().items())
    assert [name for name, p in alone.named_parameters() if not p.requires_grad] == ["classifier.bias"]
    resting = [name for name, module in alone.named_modules() if not module.training]
    assert resting
    assert all(name.startswith("classifier") for name in resting)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in alone.modules())


# Odd modules


class Shared(nn.Module):
    """One convolution that runs twice, with a norm of its own each time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x):
        for norm in self.norms:
            x = norm(self.conv(x))
        return x


class Channels(nn.Module):
    """A linear layer at every position of a map."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 5, bias=False)

    def forward(self, x):
        return self.mix(x.permute(0, 2, 3, 1))


class Functional(nn.Module):
    """Arguments by name, no nn.Conv2d."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, weight=self.weight * 1, stride=(2, 2), padding="valid")


class Crop(nn.Module):
    """Rows of a map as a sequence, without the last."""

    def forward(self, x):  # (1, 3, 12, 12) -> (1, 35, 12)
        return x.flatten(1, 2)[:, :-1]


def test_a_layer_that_runs_twice_is_stored_once():
    net = Shared()
    layers = traced_layers(net, 8)
    first = ConvLayer(3, 3, 8, 3, 1, 1, 8, 8, image_input=True, bias=True)
    assert layers == [first, replace(first, image_input=False, bias=False, shared=True)]
    assert [layer.name for layer in layers] == ["conv", "conv"]
    assert sum(layer.params for layer in layers) == sum(p.numel() for p in net.parameters())
    assert sum(layer.macs for layer in layers) == 2 * 81 * 64
    assert sum(layer.size_bytes for layer in layers) == 81 + 2 * 3 * 8  # each run has a norm of its own


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Channels(), ConvLayer(3, 5, 6, 1, 1, 1, 8, 8, norm=False)),
        # 6 pixels give 2 outputs without padding: as many as 4 pixels give with it
        (Functional(), ConvLayer(3, 4, 4, 3, 2, 1, 8, 8, image_input=True, norm=False)),
        (nn.Sequential(nn.Flatten(), nn.Linear(108, 7)), ConvLayer(108, 7, 1, 1, 1, 1, 8, 8, **BIASED)),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), ConvLayer(3, 6, 6, 3, 1, 3, 8, 8, image_input=True, **BIASED)),
        (nn.Conv2d(3, 6, 1, dilation=2), ConvLayer(3, 6, 6, 1, 1, 1, 8, 8, image_input=True, **BIASED)),
    ],
    ids=["linear-on-map", "functional", "linear", "grouped", "dilated-1x1"],
)
def test_odd_modules(net, expected):
    assert traced_layers(net, 6) == [expected]
    assert traced_layers(net.to("meta"), 6) == [expected]


def test_no_layers():
    assert traced_layers(nn.ReLU(), 6) == []


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(3, 4, (1, 7)), "layer 1: its kernel is 1 x 7, not square"),
        (nn.Conv2d(3, 4, 3, padding=(0, 1)), "layer 1: its output is 10 x 12, not square"),
        (nn.Conv2d(3, 4, 3, stride=(3, 4)), "layer 1: its stride is 3 x 4, not square"),
        (nn.Conv2d(3, 4, 3, dilation=2), "layer 1: its dilation is not 1"),
        (nn.ConvTranspose2d(3, 4, 3), "layer 1: it runs conv_transpose2d"),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3)), r"layer 1\.1: it runs conv1d"),
        (nn.Sequential(Crop(), nn.Linear(12, 4)), r"layer 1\.1: it runs at 35 positions, which are not a square map"),
        (nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Flatten(0, 1), nn.Conv2d(1, 1, 3)), r"layer 1\.2: it does 2700 mul"),
        (nn.Conv2d(5, 4, 3), "Sequential does not run on .* 3 x 12 x 12: layer 1 takes 5 channels and gets 3"),
    ],
    ids=["kernel", "output", "stride", "dilation", "transposed", "conv1d", "positions", "batch", "channels"],
)
def test_what_cannot_be_listed_is_named(layer, message):
    with pytest.raises(UserError, match=message):
        traced_layers(nn.Sequential(nn.ReLU(), layer), 12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_b_16", "encoder_layer_0.self_attention: it runs multi_head_attention_forward"),
        ("swin_t", r"features\.1\.0\.attn: it runs matmul"),
        ("inception_v3", r"Mixed_6b\.branch7x7_2\.conv: its kernel is 1 x 7"),
    ],
)
def test_networks_of_other_operations_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        network_named(name)


def test_empty_weights_leave_other_tensors_alone():
    with EmptyWeights():
        net, number = nn.Linear(10, 10), torch.tensor([2.5]).round()
    assert net.weight.is_meta
    assert number.item() == 2


# Command line


@pytest.fixture
def experiment(tmp_path):
    """The result of a search in the digits space, priced on an accelerator other than the published one."""
    subnet = subnets_of(DIGITS, sample(DIGITS, 1, np.random.default_rng(5)))[0]
    slow = {"accelerator": {"clock_mhz": 250}, "table": None}
    return write_found(tmp_path / "exps" / "mine", DIGITS, subnet, cost_model=slow), subnet


def test_command_prints_a_torchvision_model(capsys):
    main(["--model", "mobilenet_v2", "--bits", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert "mobilenet_v2" in lines[0]
    assert [re.split(r"  +", line) for line in lines[1:-1]] == [
        ["cost", "full scope"],
        ["latency, ms", "9.0986"],
        ["energy, mJ", "12.4587"],
        ["BitOps, M", "19249.6"],
        ["MACs, M", "300.774"],
        ["MACs w a / 64, M", "300.774"],
        ["parameters, k", "3504.9"],
        ["model size, kB", "3610.2"],
    ]
    assert lines[-1] == "latency and energy: BitFusion as published"


def test_command_prints_an_experiment_as_its_search_priced_it(capsys, tmp_path, experiment):
    found, subnet = experiment
    slow = BitFusion(Accelerator(clock_mhz=250))
    shown = printed(capsys, "--model", str(found.path))
    for scope, cost in network_costs(DIGITS, subnet, slow).items():
        assert shown["costs"][scope]["latency_ms"] == pytest.approx(cost.latency_ms)
        assert shown["costs"][scope]["params"] == cost.params
    chip = tmp_path / "chip.json"
    chip.write_text('{"clock_mhz": 500}')
    fast = printed(capsys, "--model", str(found.path), "--config", str(chip))
    assert fast["costs"]["full"]["latency_ms"] == pytest.approx(shown["costs"]["full"]["latency_ms"] / 2)
    with pytest.raises(UserError, match="has its own bits"):
        main(["--model", str(found.path), "--bits", "8"])


@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_command_prints_the_ends_of_a_space(capsys, end):
    shown = printed(capsys, "--model", f"apq-imagenet:{end}", "--layers")
    i = -1 if end == "largest" else 0
    spec = {"ks": [(3, 7)[i]] * 21, "e": [(4, 6)[i]] * 21, "d": [(2, 4)[i]] * 6}
    policy = {kind.setting: [8] * 21 for kind in APQ_IMAGENET.operands}
    for scope in ("published", "full"):
        expected = LatencyPredictor(type="latency", scope=scope).predict_lat({**spec, **policy})
        assert shown["costs"][scope]["latency_ms"] == pytest.approx(expected)
    for key, column in {"latency_ms": "ms", "energy_mj": "mJ", "macs": "MACs", "params": "params"}.items():
        assert sum(row[column] for row in shown["layers"]) == pytest.approx(shown["costs"]["full"][key])


def test_ends_of_a_space_that_chooses_all_bits(capsys):
    shown = printed(capsys, "--model", "qfa-mbv3:largest", "--layers")
    layers = layers_of(QFA_MBV3, largest_subnet(QFA_MBV3))
    assert shown["costs"]["full"]["macs"] == sum(layer.macs for layer in layers)
    rows = printed(capsys, "--model", "qfa-mbv3:smallest", "--bits", "2x3", "--layers")["layers"]
    assert {row["bits"] for row in rows} == {"W2A3", "W32A32", "W8A8"}
    assert rows[-1]["bits"] == "W8A8"  # the classifier


def test_bits_of_a_space_are_of_its_searched_layers(capsys):
    rows = printed(capsys, "--model", "digits:smallest", "--bits", "4x6", "--layers")["layers"]
    assert [row["bits"] for row in rows] == ["W8A8"] * 3 + ["W4A6"] * (len(rows) - 5) + ["W8A8"] * 2


def test_command_on_a_table(capsys, tmp_path):
    path = tmp_path / "phone.json"
    path.write_text('{"(64, 64, 56, 3, 1, 1, 1)-W8A8": {"latency": 2, "energy": 0.5}}')
    main(["--model", "resnet18", "--layers", "--table", str(path)])
    out = capsys.readouterr().out
    assert re.search(r"layer1.0.conv1 .* 2.00000 +0.50000", out)
    assert re.search(r"latency, ms +not known", out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "mobilnet_v2"], "unknown model 'mobilnet_v2'; nearest: mobilenet_v2, "),
        (
            ["--model", "zzz"],
            "^unknown model 'zzz'; give a classification model of torchvision, .{,200}exps/NAME.{,50}$",
        ),
        (["--model", "digits"], "digits is a space: .*digits:largest"),
        (["--model", "digits:huge"], "known: smallest, largest"),
        (["--model", "mars:largest"], "unknown space 'mars'"),
        (["--model", "exps/nowhere"], "no experiment at exps/nowhere"),
        (["--model", "resnet18", "--bits", "4x"], "'4x' is not like 8, or 4x8"),
        (["--model", "resnet18", "--bits", "0"], "'0' is not like 8"),
        (["--model", "resnet18", "--bits", "9"], "at most 8 bits"),
        (["--model", "digits:largest", "--bits", "5"], "is 5; allowed: 4, 6, 8"),
        (["--model", "digits:largest", "--bits", "4"], "no 7x7 depthwise with 4-bit"),
        (["--model", "alexnet", "--resolution", "16"], "AlexNet does not run on an image of 3 x 16 x 16: .*too small"),
        (["--model", "resnet18", "--out", "x.json"], "--out belongs to writing the table of a space"),
        (["--out", "x.json", "--bits", "8"], "--bits belongs to --model"),
        (["--space", "digits"], "give --model NAME .* --space SPACE --out FILE"),
        ([], "give --model NAME"),
    ],
)
def test_mistakes_get_one_clear_line(flags, message):
    with pytest.raises(UserError, match=message):
        main(flags)


def test_tables_are_written_without_torch(tmp_path):
    code = "import sys; from lut.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "table.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
