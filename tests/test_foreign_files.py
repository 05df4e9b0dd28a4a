"""Weights and tables that others wrote: read as they mean it, or refused in a line."""

from __future__ import annotations

import argparse
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from apq.files import read_json
from apq.layers import ConvLayer
from elastic_nn.networks.checkpoint_layout import published_state
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.named_models import build_model, named_model
from lut import bitfusion, table
from lut.bitfusion import BitFusion
from lut.cost_model import UNITS
from lut.measured import load_measured

NAME = "mobilenet_v2_small"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def trained():
    """A network for ImageNet's channels, with statistics of its own."""
    torch.manual_seed(0)
    net = build_model(named_model(NAME, "imagenet"))
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    return {key: tensor.clone() for key, tensor in net.state_dict().items()}


def loaded(tmp_path, data):
    torch.save(data, tmp_path / "w.pth")
    return load_model(tmp_path / "w.pth", NAME)[0].state_dict()


def renamed(state, rename):
    return {rename(key): value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        # torchvision/references/classification/train.py
        lambda state: {
            "model": state,
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
            "lr_scheduler": {"last_epoch": 3},
            "epoch": 3,
            "args": argparse.Namespace(model="mobilenet_v2", lr=0.1, data_path="/x"),
            "model_ema": {"n_averaged": torch.tensor(3), **renamed(state, "module.{}".format)},
        },
        # pytorch/examples/imagenet/main.py
        lambda state: {
            "epoch": 3,
            "arch": "x",
            "state_dict": renamed(state, "module.{}".format),
            "best_acc1": torch.tensor(0.7),
            "optimizer": {"state": {}, "param_groups": []},
        },
        lambda state: {"state_dict": renamed(state, "model.{}".format), "pytorch-lightning_version": "2.0"},
        lambda state: {"model_state_dict": state, "loss": 0.5},
        lambda state: {"model": NAME, "state_dict": state},
        lambda state: {"model": {"name": NAME, "depth": 3}, "state_dict": state},
        lambda state: {"model": None, "weights": state},
        lambda state: {"my_weights": state, "epoch": 1},
        lambda state: renamed(state, "_orig_mod.{}".format),
        lambda state: {"model": renamed(state, "module._orig_mod.{}".format)},
        lambda state: {"model": renamed(state, "_orig_mod.module.{}".format)},
        lambda state: renamed(state, lambda key: key.replace("features.3.", "features.3._orig_mod.")),
    ],
)
def test_usual_files_fit(tmp_path, trained, wrap):
    found = loaded(tmp_path, wrap(trained))
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[key], value) for key, value in trained.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_of_other_sizes_are_converted(tmp_path, trained, dtype):
    other = {key: value.to(dtype) if value.is_floating_point() else value for key, value in trained.items()}
    found = loaded(tmp_path, {"model": other})
    for key, value in trained.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], other[key].to(value.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_codes_are_no_weights(tmp_path, trained, dtype):
    key = "features.1.conv.0.0.weight"
    with pytest.raises(UserError, match=rf"w\.pth, model {NAME}: tensor {key} has values of type {dtype}"):
        loaded(tmp_path, {**trained, key: trained[key].to(dtype)})
    counter = "features.0.1.num_batches_tracked"
    for value in (torch.tensor(1.5), torch.tensor(True)):
        with pytest.raises(UserError, match=f"tensor {counter} has values of type {value.dtype}"):
            loaded(tmp_path, {**trained, counter: value})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_of_other_kinds_are_no_weights(tmp_path, trained):
    key = "features.1.conv.0.0.weight"
    coded = torch.quantize_per_tensor(trained[key], 0.1, 0, torch.qint8)
    for odd in (trained[key].to_sparse(), coded, trained[key].to("meta")):
        with pytest.raises(UserError, match="holds a tensor that is not a plain one"):
            loaded(tmp_path, {**trained, key: odd})
    with pytest.raises(UserError, match=key):
        loaded(tmp_path, {**trained, key: trained[key].flatten()[:1].to(torch.complex64)})
    with pytest.raises(UserError, match="not finite"):
        loaded(tmp_path, {**trained, key: trained[key].double() * 1e300})
    with pytest.raises(UserError, match="keys twice"):
        loaded(tmp_path, {**trained, f"_orig_mod.{key}": trained[key]})


def test_variances_are_not_negative(tmp_path, trained):
    key = "features.0.1.running_var"
    with pytest.raises(UserError, match=rf"w\.pth, model {NAME}: .* 1 with negative variances \({key}\)$"):
        loaded(tmp_path, {**trained, key: trained[key] - 2})
    loaded(tmp_path, {**trained, key: torch.zeros_like(trained[key])})


def test_published_files_may_be_wrapped_too(tmp_path):
    weights = {"module._orig_mod.classifier.linear.weight": torch.ones(2, 3)}
    for data in (weights, {"model": weights}, {"state_dict": weights, "epoch": 1}):
        state, layout = published_state(tmp_path, data)
        assert (state["classifier.linear.weight"].shape, layout.name) == ((2, 3), "apq")


# Measured costs

ROWS = [(0, 1, 8, 5.0), (0, 8, 1, 7.5), (1, 2, 4, 0.25), (2, 4, 2, 1e6)]


def measured(tmp_path, text, quantity="latency", encoding="utf-8"):
    file = tmp_path / "own.csv"
    file.write_text(text, encoding=encoding, newline="")
    return load_measured(file, "abc", quantity).cells


def expected():
    cells = np.full((3, 8, 8), np.nan)
    for layer, w, a, cost in ROWS:
        cells[layer, w - 1, a - 1] = cost
    return cells


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
@pytest.mark.parametrize("names", [("layer", "w_bits", "a_bits", "cost"), (" Layer", "W_bits ", "a", "latency")])
def test_columns_are_those_that_the_header_names(tmp_path, order, names):
    lines = [[names[i] for i in order], *([str(row[i]) for i in order] for row in ROWS)]
    for mark, end, encoding in ((",", "\n", "utf-8"), (";", "\r\n", "utf-8-sig"), ("\t", "\r", "utf-8")):
        text = end.join(mark.join(line) for line in lines)
        for tail in ("", end, end * 3, f"{end}{mark * 3}{end}"):
            np.testing.assert_array_equal(measured(tmp_path, text + tail, encoding=encoding), expected())


def test_rows_without_a_header_have_the_published_order(tmp_path):
    text = "\n\n" + "\n".join(",".join(map(str, row)) for row in [*ROWS, ROWS[0]])  # twice the same is no contradiction
    np.testing.assert_array_equal(measured(tmp_path, "\ufeff" + text), expected())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "layer,w_bits,a_bits,cost\n0,1,8,5\n0,1,8,6\n",
            "line 3: layer 0 at 1 weight and 8 activation bits costs 6, but 5",
        ),
        ("a_bits,w_bits,layer,cost\n1,8,0,5\n1,8,0,6\n", "layer 0 at 8 weight and 1 activation bits costs 6"),
        ("layer,w_bits,a_bits,energy\n0,1,8,5\n", "its costs are energy, not latency"),
        ("layer,bits,a_bits,cost\n", "its columns are layer, bits, a_bits, cost; they must be"),
        ("layer,w_bits,w_bits,cost\n", "they must be layer, w_bits, a_bits and a cost"),
        ("layer,w_bits,a_bits,cost,energy\n", "they must be layer"),
        ("layer;w_bits;a_bits;cost\n0;1;8;0,5\n", "line 2: cost 0,5 is not a number from 0 up, with a decimal point"),
        ("0,1,8,-1\n", "line 1: cost -1"),
        ("0,1,8,nan\n", "line 1: cost nan"),
        ("0,1,8,-inf\n", "line 1: cost -inf"),
        ("0,1,8,1e999\n", "line 1: cost 1e999"),
        ("0,1,8\n", "line 1 has 3 columns, not 4"),
        ("3,1,8,1\n", "line 1: 3 is not from 0 to 2"),
        ("0,1,9,1\n", "line 1: 9 is not from 1 to 8"),
        ("0,1,1,1\nlayer,w_bits,a_bits,cost\n", "line 2: layer is not a whole number"),
        ("0,1,8.0,1\n", "line 1: 8.0 is not a whole number, in digits 0 to 9 alone"),
        ("1_0,1,8,1\n", "line 1: 1_0 is not a whole number"),
        ("0,1,\u0668,1\n", "line 1: \u0668 is not a whole number"),
        ("0,1,8,1_000\n", "line 1: cost 1_000 is not a number"),
        ("0,1,8,\u0661\n", "line 1: cost \u0661 is not a number"),
        ("0,1,8,\n", "line 1 has 3 columns, not 4"),
        ("", "it has no rows"),
        ("layer,w_bits,a_bits,cost\n,,,\n", "it has no rows"),
        ("0,1,1,\0\n", "own.csv is not a table"),
        ('0,1,1,"' + "9" * 200_000 + '"\n', "own.csv is not a table"),
    ],
)
def test_unclear_tables_are_refused_in_a_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        measured(tmp_path, text)
    assert len(str(caught.value)) < 10_000
    with pytest.raises(UserError, match="not a table"):
        measured(tmp_path, text, encoding="utf-16")


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        *(("cost", quantity) for quantity in UNITS),
        *((f"{quantity} ({unit})", quantity) for quantity, unit in UNITS.items()),
        ("Price", "energy"),
        ("energy_mj", "energy"),
        ("Energy (\u00b5J)", "energy"),
        ('"energy, mJ"', "energy"),
        ("bitops_m", "bitops"),
        ("latency [us]", "latency"),
        ("cost_ms", "latency"),
        ("size_bits", "size"),
    ],
)
def test_costs_have_the_name_of_one_quantity(tmp_path, name, quantity):
    """With or without a unit. A table of one quantity is never one of another."""
    text = f"layer,w_bits,a_bits,{name},\n0,1,8,5,,\n"  # with empty cells of a spreadsheet
    assert measured(tmp_path, text, quantity)[0, 0, 7] == 5
    for other in {*UNITS} - {quantity} if name.lower() not in ("cost", "price") else ():
        with pytest.raises(UserError, match="its costs are"):
            measured(tmp_path, text, other)


@pytest.mark.parametrize(
    "name", ["power", "latency_std", "energy_ms", "cost_mj", "latency_energy", "cost energy", "ms"]
)
def test_other_names_of_costs_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"own.csv .* its costs are .*{name}"):
        measured(tmp_path, f"layer,w_bits,a_bits,{name}\n0,1,8,5\n")


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_any_order_of_rows_and_columns_is_one_table(tmp_path_factory, seed):
    rng, file = random.Random(seed), tmp_path_factory.getbasetemp() / "any.csv"
    rows = {(rng.randrange(3), rng.randint(1, 8), rng.randint(1, 8)): rng.choice((0, 0.1, 3, 1e-9)) for _ in range(9)}
    order, cells = rng.sample(range(4), 4), np.full((3, 8, 8), np.nan)
    for (layer, w, a), cost in rows.items():
        cells[layer, w - 1, a - 1] = cost
    lines = [[*key, cost] for key, cost in rows.items()]
    rng.shuffle(lines)
    lines.insert(0, ["layer", "w_bits", "a_bits", "cost"])
    file.write_text(
        "\n".join(rng.choice(("", " ")).join(("", ",".join(str(line[i]) for i in order))) for line in lines)
    )
    np.testing.assert_array_equal(load_measured(file, "abc", "energy").cells, cells)


# Tables and caches of prices


def test_a_key_with_two_values_is_refused(tmp_path):
    file, row = tmp_path / "own.json", '{"latency": 1, "energy": 2}'
    file.write_text(f'\ufeff{{"head": {row}, "head": {row}}}')
    assert table.load(file).rows == {"head": (1, 2)}
    for twice in (
        f'{{"head": {row}, "head": {{"latency": 2, "energy": 2}}}}',
        '{"head": {"latency": 1, "latency": 2}}',
    ):
        file.write_text(twice)
        with pytest.raises(UserError, match=r"cannot read .*own\.json: key '(head|latency)' has two values"):
            table.load(file)
    file.write_text('{"a": [{"b": 1, "b": 1.5}]}')
    with pytest.raises(UserError, match="key 'b' has two values"):
        read_json(file)


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "-0.1", "1" + "0" * 400, "1e400", "true", "null", '"1"']
)
@pytest.mark.parametrize("quantity", ["latency", "energy"])
def test_tables_have_prices_only(tmp_path, value, quantity):
    row = {"latency": "1", "energy": "2", quantity: value}
    inside = ", ".join(f'"{name}": {text}' for name, text in row.items())
    (tmp_path / "own.json").write_text(f'{{"head": {{{inside}}}}}')
    with pytest.raises(UserError, match="64 bits" if value.startswith("100") else "row head must hold"):
        table.load(tmp_path / "own.json")
    (tmp_path / "chip.json").write_text(f'{{"clock_mhz": {value}}}')
    with pytest.raises(
        UserError, match="64 bits" if value.startswith("100") else "clock_mhz must be a positive number"
    ):
        BitFusion(bitfusion.Accelerator(**read_json(tmp_path / "chip.json")))


LAYERS = [ConvLayer(8, 16, 8, 3, 1, 1, 4, 8), ConvLayer(16, 16, 8, 3, 2, 16, 8, 8)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows, costs: (rows, -costs),
        lambda rows, costs: (rows, costs * [[1, -1], [1, 1]]),
        lambda rows, costs: (rows, costs * [[0, 1], [1, 1]]),
        lambda rows, costs: (rows, costs * [[1, np.nan], [1, 1]]),
        lambda rows, costs: (rows, costs * [[1, 1], [np.inf, 1]]),
        lambda rows, costs: (rows, costs * 1j),
        lambda rows, costs: (rows, np.ones((2, 2), dtype=np.int64)),
        lambda rows, costs: (rows, np.ones((2, 2), dtype=bool)),
        lambda rows, costs: (rows, costs.astype(str)),
        lambda rows, costs: (np.repeat(rows[:1], 2, axis=0), costs),
        lambda rows, costs: (rows[:, :-1], costs),
        lambda rows, costs: (rows.astype(float), costs),
        lambda rows, costs: (rows[0], costs),
    ],
)
def test_a_damaged_cache_is_never_believed(damage):
    right = BitFusion().price(LAYERS)
    file = BitFusion().cache_file
    with np.load(file) as data:
        rows, costs = damage(data["layers"], data["costs"])
    with file.open("wb") as out:
        np.savez(out, layers=rows, costs=costs)
    np.testing.assert_array_equal(BitFusion().price(LAYERS), right)
    with np.load(file) as data:
        assert (data["costs"] > 0).all()
