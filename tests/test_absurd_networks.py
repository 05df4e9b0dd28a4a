"""Descriptions of networks that no machine can hold are refused before anything is built."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from bounded import refused
from conftest import ROOT
from example_spaces import ALL, TINY, WIDE
from test_bounds import linux

from apq.checkpoint import save_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.genes import largest_subnet
from apq.layers import ConvLayer, layers_of
from apq.model import model_to_dict
from apq.policy import policy_from_dict
from apq.presets import APQ_IMAGENET, DIGITS, QFA_MBV3, get_space
from apq.search_result import read_result
from apq.skeleton import built_for, without_weights
from apq.space import space_from_dict, space_to_dict
from apq.stages import Stage
from apq.subnet import spec_of, subnet_from_spec
from dataset.pairs import PairStore
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.networks.policy_file import load_policy_model
from elastic_nn.networks.subnet_file import load_subnet
from elastic_nn.networks.supernet_file import build_supernet, load_supernet
from elastic_nn.quantizers import SCHEMES
from lut.accelerator import accelerator_from_dict
from lut.bitfusion import BitFusion
from lut.cost_model import cost_model_from_flags
from lut.table import load as load_table
from report.fronts import load_front
from utils.predictor_files import load_predictor

HUGE = 10**400
DATA = space_to_dict(DIGITS)
STAGE, KIND = DATA["stages"][0], DATA["operands"][0]
SPACES = {
    "depths": {"stages": [{**STAGE, "depths": [1, 10**9]}]},
    "many stages": {"stages": [STAGE] * 5000},
    "width": {"stages": [{**STAGE, "width": 10**9}]},
    "stride": {"stages": [{**STAGE, "stride": 10**9}]},
    "weights": {"stages": [{**STAGE, "width": 60_000}], "ratios": [64]},
    "channels": {"stages": [{**STAGE, "width": 60_000}], "ratios": [0.001, 1], "channel_step": 1},
    "many bits": {
        "operands": [{**kind, "choices": list(range(2, 33))} for kind in space_to_dict(QFA_MBV3)["operands"]]
    },
    "bits": {"operands": [{**KIND, "choices": [8, 10**9]}, *DATA["operands"][1:]]},
    "twice": {"operands": [{**KIND, "name": "same"}, *({**kind, "name": "same"} for kind in DATA["operands"][1:])]},
    "many choices": {"resolutions": list(range(1, 10**6))},
    "kernel": {"kernel_sizes": [3, 10**9 + 1]},
    "ratio": {"ratios": [1, 1e308]},
    "endless ratio": {"ratios": [1, math.inf]},
    "no number": {"ratios": [math.nan]},
    "name": {"name": ["x"]},
    "dataset": {"dataset": 1},
    "depth": {"stages": [{**STAGE, "depths": [True]}]},
}
SPACES |= {
    what: {what: 10**9}
    for what in (
        "n_classes",
        "in_channels",
        "stem_width",
        "stem_stride",
        "first_block_width",
        "head_width",
        "fixed_bits",
    )
}
SPACES |= {f"{what} of 400 digits": {what: HUGE} for what in ("n_classes", "head_width", "channel_step", "end_bits")}


@linux
@pytest.mark.parametrize("change", SPACES.values(), ids=SPACES)
def test_absurd_spaces_are_refused_at_once(tmp_path, change):
    (tmp_path / "s.json").write_text(json.dumps({**DATA, **change}))
    message = refused(lambda: get_space(str(tmp_path / "s.json")).size())
    assert str(tmp_path / "s.json") in message
    assert len(message) < 2000


def test_large_spaces_that_people_may_want_are_not_refused():
    bits = tuple(range(2, 9))
    wide = replace(QFA_MBV3, operands=tuple(replace(kind, choices=bits) for kind in QFA_MBV3.operands))
    assert wide.size() > QFA_MBV3.size()
    replace(APQ_IMAGENET, n_classes=21_841, resolutions=tuple(range(128, 513, 4)))
    deep = tuple(replace(stage, depths=tuple(range(1, 41))) for stage in APQ_IMAGENET.stages)
    assert len(replace(APQ_IMAGENET, stages=deep).slots) == 40 * len(deep)
    double = tuple(replace(stage, width=4 * stage.width) for stage in QFA_MBV3.stages)
    large = replace(QFA_MBV3, stages=double)
    assert sum(layer.weights for layer in layers_of(large, largest_subnet(large))) > 1e8


@pytest.mark.parametrize("space", [TINY, WIDE], ids=["tiny", "wide"])
def test_the_size_of_a_space_counts_rules_as_one_by_one(space):
    """The count of each slot by brute force: every kernel with every combination of bits."""
    combinations = itertools.product(space.kernel_sizes, itertools.product(*(kind.choices for kind in space.operands)))
    legal = sum(space.broken_rule(kernel, bits) is None for kernel, bits in combinations)
    total = 0
    for depths in itertools.product(*(stage.depths for stage in space.stages)):
        running = [slot for slot in space.slots if slot.runs_at(depths)]
        total += math.prod(len(slot.mid_channels) * legal for slot in running)
    assert space.size() == total * len(space.resolutions)


def large_space():
    """A space with nearly as many weights as are supported, 4 GB of them."""
    return replace(TINY, stages=(Stage(width=8000, stride=1, depths=(1, 8)),), ratios=(1.0,), kernel_sizes=(3,))


SMALL = {"state_dict": {"w": torch.zeros(3)}}
SPEC = named_model("mobilenet_v1_small", "digits")
PLAIN = model_to_dict(SPEC)


def described(space):
    return {"space": space_to_dict(space), **spec_of(space, largest_subnet(space)), "recipe": None, **SMALL}


def of_policy(model):
    layers = [asdict(ConvLayer(3, 8, 32, 3, 2, 1, 8, 8, name="features.0.0"))]
    return {"quantizer": "linear", "strategy": [[8, -1]], "layers": layers, "model": model}


FILES = {
    "supernet": (load_supernet, lambda: described(large_space())),
    "subnet": (load_subnet, lambda: described(large_space())),
    "published classes": (load_supernet, lambda: {"classifier.linear.weight": torch.zeros(1 << 20, 1)}),
    "float subnet": (
        load_model,
        lambda: {
            "model": {**described(large_space()), **PLAIN, "name": "subnet", "n_classes": 10, "resolution": 24},
            **SMALL,
        },
    ),
    "classes": (
        load_model,
        lambda: {"model": {**PLAIN, "name": "vgg16", "resolution": 224, "n_classes": 1 << 20}, **SMALL},
    ),
    "too many classes": (load_model, lambda: {"model": {**PLAIN, "n_classes": HUGE}, **SMALL}),
    "resolution": (load_model, lambda: {"model": {**PLAIN, "name": "resnet18", "resolution": 4096}, **SMALL}),
    "network": (load_model, lambda: {"model": {**PLAIN, "name": "regnet_y_128gf", "resolution": 224}, **SMALL}),
    "other name": (load_model, lambda: {"model": {**PLAIN, "name": ["vgg16"]}, **SMALL}),
    "policy": (
        load_policy_model,
        lambda: {
            "model": {**PLAIN, "name": "vgg16", "resolution": 224, "n_classes": 1 << 20},
            "quantization": of_policy(None),
            "signed": {"features.0.0": True},
            **SMALL,
        },
    ),
    "hidden": (load_predictor, lambda: {"space": DATA, "state_dict": {"layers.0.0.weight": torch.zeros(1 << 20, 1)}}),
    "predictor without numbers": (
        load_predictor,
        lambda: {"space": DATA, "state_dict": {"layers.0.0.weight": torch.zeros(10**9, 0)}},
    ),
}


@linux
@pytest.mark.parametrize(("read", "make"), FILES.values(), ids=FILES)
def test_no_network_is_built_that_its_file_does_not_hold(tmp_path, read, make):
    data = make()
    data.pop("recipe", None) if read is not load_supernet else None
    save_checkpoint(tmp_path / "n.pt", data)
    assert str(tmp_path / "n.pt") in refused(lambda: read(tmp_path / "n.pt"))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES.values() if scheme.quantizes], ids=lambda s: s.name)
def test_skeletons_have_the_shapes_of_networks_and_draw_nothing(scheme):
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    with without_weights():
        skeleton = build_supernet(DIGITS, scheme)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {tensor.device.type for tensor in skeleton.state_dict().values()} == {"meta"}
    net = build_supernet(DIGITS, scheme)
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}
    forms = [{key: (tensor.shape, tensor.dtype) for key, tensor in one.state_dict().items()} for one in (skeleton, net)]
    assert forms[0] == forms[1]


@pytest.mark.parametrize("name", ["regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_skeletons_of_named_networks(name):
    spec = named_model(name)
    torch.manual_seed(3)
    with without_weights():
        skeleton = build_model(spec)
    net = build_model(spec)
    torch.manual_seed(3)
    again = built_for(lambda: build_model(spec), net.state_dict())
    shapes = [[(k, v.shape) for k, v in one.state_dict().items()] for one in (skeleton, net, again)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())


NUMBERS = [HUGE, -HUGE, math.nan, math.inf, 1e308, True, "1", None, [1], {"a": 1}, -1, 0.5]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("key", ["ks", "e", "d", "resolution", "pw_w_bits_setting"])
def test_specs_with_impossible_numbers(key, value):
    spec = spec_of(DIGITS, largest_subnet(DIGITS))
    spec = {**spec["arch"], **spec["policy"]}
    for changed in (value, [value] * len(spec.get(key, [1])), [value]):
        if changed == spec.get(key, 32):
            continue
        with pytest.raises(UserError):
            subnet_from_spec(DIGITS, {**spec, key: changed})


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("key", list(ConvLayer.__dataclass_fields__))
def test_layers_of_policies_with_impossible_numbers(key, value):
    stored = of_policy(None)
    layer = {**stored["layers"][0], key: value}
    if type(value) is type(stored["layers"][0][key]) and not (type(value) is int and not 1 <= value <= 32):
        return  # a name or a flag
    with pytest.raises(UserError, match=key):
        policy_from_dict({**stored, "layers": [layer]})


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:20])
def test_files_of_costs_with_impossible_numbers(tmp_path, value):
    path = tmp_path / "f.json"
    if value not in (1e308, 0.5):
        path.write_text(json.dumps({"head": {"latency": value, "energy": 1.0}}))
        with pytest.raises(UserError, match="64 bits" if value in (HUGE, -HUGE) else "head"):
            load_table(path)
    for name in ("rows", "clock_mhz", "max_bits", "dram_nj_per_bit"):
        if value == 0.5 and name in ("clock_mhz", "dram_nj_per_bit"):
            continue
        with pytest.raises(UserError, match=name):
            accelerator_from_dict({name: value})
        path.write_text(json.dumps({name: value}))
        with pytest.raises(UserError, match="64 bits" if value in (HUGE, -HUGE) else name):
            cost_model_from_flags(path, None)


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:20])
def test_pairs_with_impossible_numbers(tmp_path, value):
    store, subnet = PairStore(tmp_path), largest_subnet(DIGITS)
    store.open(DIGITS, {}, 1)
    for field in ("index", "accuracy"):
        if (field, value) in (("accuracy", 0.5),):
            continue
        record = {"index": 0, **spec_of(DIGITS, subnet), "accuracy": 0.5, field: value}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(UserError, match="line 1"):
            store.load(DIGITS)


@linux
@pytest.mark.parametrize("key", ["lat", "predicted_accuracy", "constraint", "history", "front"])
@pytest.mark.parametrize("value", [HUGE, "x", [10**9], {"a": 1}], ids=["huge", "text", "list", "object"])
def test_results_with_impossible_numbers(tmp_path, key, value):
    """The shipped search from coarse to fine, with one value changed."""
    for file in (ROOT / "exps/oqa-4bit").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    experiment, config = Experiment(tmp_path), json.loads((tmp_path / "config.json").read_text())
    load_front(experiment)
    if key == "lat":
        experiment.lat.write_text(json.dumps([value]))
    elif key == "history":
        experiment.history.write_text(json.dumps([value]) + "\n")
    elif key == "front":
        experiment.front.write_text(json.dumps([value]))
        if isinstance(value, dict):
            return  # points are checked where they are used
    else:
        experiment.config.write_text(json.dumps({**config, key: value}))
    assert str(tmp_path) in refused(lambda: read_result(experiment))


def test_a_damaged_cache_of_prices_is_not_believed():
    layers = [ConvLayer(16, 32, 8, 3, 1, 1, w, 8) for w in (2, 4, 8)]
    expected, file = BitFusion().price(layers), BitFusion().cache_file
    with np.load(file) as arrays:
        whole = dict(arrays)
    damaged = [{**whole, "costs": -whole["costs"]}, {**whole, "costs": 2 * whole["costs"]}]
    damaged += [{**whole, "layers": whole["layers"][::-1]}, {**whole, "costs": whole["costs"][:1]}]
    damaged += [{name: array for name, array in whole.items() if name != "checksum"}]
    for arrays in damaged:
        with file.open("wb") as out:
            np.savez(out, **arrays)
        np.testing.assert_array_equal(BitFusion().price(layers), expected)
    intact = file.read_bytes()
    for place in range(0, len(intact), 11):
        file.write_bytes(intact[:place] + bytes([intact[place] ^ 64]) + intact[place + 1 :])
        np.testing.assert_array_equal(BitFusion().price(layers), expected)


def test_every_space_here_is_read_back():
    for space in ALL.values():
        assert space_from_dict(json.loads(json.dumps(space_to_dict(space)))) == space
