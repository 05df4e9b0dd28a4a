"""Cost models: a kind from outside, layers that tables cover, records and how they are read."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from conftest import ROOT
from example_results import write_found
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from apq.genes import sample, subnets_of
from apq.layers import ConvLayer, layers_of
from apq.presets import APQ_IMAGENET, DIGITS, QFA_MBV3
from apq.space import SCOPES
from lut import table
from lut.__main__ import main
from lut.accelerator import Accelerator
from lut.bit_costs import linear_costs
from lut.bitfusion import BitFusion
from lut.cost_model import COST_MODELS, CostModel, cost_model_from_flags, cost_model_from_record, recorded_cost_model
from lut.costs import cost_of, layer_quantity
from lut.measured import load_measured
from lut.population import PopulationCost

LAYERS = [ConvLayer(8, 16, 8, 3, 1, 1, w, a, name=name) for name, w, a in (("a", 8, 8), ("b", 4, 6), ("c", 2, 8))]


@dataclass(frozen=True)
class Roofline(CostModel):
    """A roofline: the time of arithmetic or of memory, whichever is longer."""

    macs_per_ms: float = 1e6
    bytes_per_ms: float = 1e5
    mj_per_bitop: float = 1e-9

    def price(self, layers):
        facts = [(layer.macs, layer.size_bytes, layer.bitops) for layer in layers]
        macs, size, bitops = np.array(facts, dtype=np.float64).reshape(-1, 3).T
        return np.stack([np.maximum(macs / self.macs_per_ms, size / self.bytes_per_ms), bitops * self.mj_per_bitop], 1)


@pytest.fixture
def _roofline(monkeypatch):
    monkeypatch.setitem(COST_MODELS, "roofline", Roofline)


def found(folder, **record):
    """An experiment whose search used the cost model in `record`."""
    subnet = subnets_of(DIGITS, sample(DIGITS, 1, np.random.default_rng(5)))[0]
    return write_found(folder / "exps" / "mine", DIGITS, subnet, cost_model=record), subnet


# A kind from outside

SPACES = {space.name: space for space in (APQ_IMAGENET, QFA_MBV3)}
POPULATIONS = {}


def population(space, quantity, scope):
    key = space.name, quantity, scope
    if key not in POPULATIONS:
        POPULATIONS[key] = PopulationCost(space, quantity, Roofline(), scope)
    return POPULATIONS[key]


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@given(seed=st.integers(0, 2**32 - 1), quantity=st.sampled_from(("latency", "energy")), scope=st.sampled_from(SCOPES))
@settings(max_examples=20)
def test_a_population_costs_the_sum_of_its_layers(space, quantity, scope, seed):
    genes = sample(space, 4, np.random.default_rng(seed))
    column = ("latency", "energy").index(quantity)
    direct = [Roofline().price(layers_of(space, net, scope))[:, column].sum() for net in subnets_of(space, genes)]
    assert population(space, quantity, scope).predict(genes) == pytest.approx(direct, rel=1e-12)


def test_a_kind_from_outside_prices_layers_networks_and_bits():
    model = Roofline(macs_per_ms=1e5)
    prices = model.price(LAYERS)
    assert model.covers(LAYERS).all()
    cost = cost_of(LAYERS, model)
    assert (cost.latency_ms, cost.energy_mj) == tuple(prices.sum(axis=0))
    assert layer_quantity(LAYERS, "energy", model).tolist() == prices[:, 1].tolist()
    costs = linear_costs(LAYERS, "energy", model)
    assert costs.per_layer(np.array([[8, 8], [4, 6], [2, 8]])).tolist() == prices[:, 1].tolist()


@pytest.mark.usefixtures("_roofline")
def test_a_kind_from_outside_is_named_by_a_file_recorded_and_read_again(tmp_path, capsys):
    chip = tmp_path / "chip.json"
    chip.write_text('{"kind": "roofline", "macs_per_ms": 500}')
    model = cost_model_from_flags(chip, None)
    assert model == Roofline(macs_per_ms=500)
    assert str(model) == "roofline with macs_per_ms 500, bytes_per_ms 100000.0, mj_per_bitop 1e-09"
    assert cost_model_from_record(json.loads(json.dumps(model.record())), chip) == model
    assert model.digest() != Roofline().digest()
    experiment, subnet = found(tmp_path, **model.record())
    assert recorded_cost_model(experiment) == model
    main(["--model", str(experiment.path), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["priced_by"] == str(model)
    assert shown["costs"]["full"] == asdict(cost_of(layers_of(DIGITS, subnet), model))


@pytest.mark.usefixtures("_roofline")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "tpu"}', "chip.json: unknown kind .* 'tpu'; known: bitfusion, bit-serial, table, roofline"),
        ('{"kind": ["tpu"]}', "unknown kind"),
        ('{"kind": "roofline", "speed": 1}', "chip.json: cost model roofline: .*unexpected keyword argument 'speed'"),
        ('{"kind": "bitfusion", "rowz": 1}', "chip.json: unknown fields rowz; known: rows"),
        ('{"kind": "table", "path": "none.json"}', "chip.json: cannot read none.json"),
        ('{"kind": "table"}', "chip.json: cost model table: missing a required argument: 'path'"),
        ('{"rowz": 1}', "chip.json: unknown fields rowz; known: rows"),
        ("[]", "chip.json must hold a JSON object"),
        ("{", "cannot read"),
    ],
)
def test_mistakes_in_a_config(tmp_path, text, message):
    (tmp_path / "chip.json").write_text(text)
    with pytest.raises(UserError, match=message):
        cost_model_from_flags(tmp_path / "chip.json", None)


def test_a_kind_without_a_row_cannot_be_recorded(tmp_path):
    with pytest.raises(UserError, match="Roofline has no row in COST_MODELS"):
        Roofline().record()
    experiment, _ = found(tmp_path, accelerator=None, table=None, cost_model={"kind": "roofline"})
    with pytest.raises(UserError, match=r"config\.json: unknown kind of cost model 'roofline'"):
        recorded_cost_model(experiment)


# The product's own kinds


def test_records_keep_their_form(tmp_path):
    """Byte for byte, because experiments of earlier releases have this record."""
    slow, own = BitFusion(Accelerator(clock_mhz=250)), tmp_path / "own.json"
    assert list(slow.record().items()) == [("accelerator", asdict(slow.config)), ("table", None)]
    own.write_text('{"head": {"latency": 2, "energy": 3}}')
    assert list(table.load(own).record().items()) == [("accelerator", asdict(Accelerator())), ("table", str(own))]
    for model in (slow, table.load(own)):
        assert cost_model_from_record(model.record(), tmp_path) == model
    assert cost_model_from_record({"accelerator": {}, "table": None}, tmp_path) == BitFusion()
    (tmp_path / "chip.json").write_text('{"kind": "bitfusion", "clock_mhz": 250}')
    assert cost_model_from_flags(tmp_path / "chip.json", None) == slow
    assert str(slow) == "BitFusion with clock_mhz 250"


def test_a_recorded_table_that_is_gone_is_asked_for(tmp_path):
    experiment, _ = found(tmp_path, accelerator={}, table="gone.json")
    with pytest.raises(UserError, match=r"cannot read gone\.json.*mine/config\.json names this table: give it with"):
        recorded_cost_model(experiment)


def test_fingerprints_see_the_rows_of_a_table(tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"head": {"latency": 2, "energy": 3}}')
    before = table.load(own)
    own.write_text('{"head": {"latency": 2, "energy": 4}}')
    assert before.record() == table.load(own).record()
    assert before.digest() != table.load(own).digest()


def test_a_published_table_prices_what_it_covers(tmp_path):
    own = tmp_path / "own.json"
    rows = {table.layer_key(layer): {"latency": i + 1, "energy": 0.5} for i, layer in enumerate(LAYERS[:2])}
    own.write_text(json.dumps({**rows, "head": {"latency": 9, "energy": 9}}))
    model, first = table.load(own), replace(LAYERS[2], name="first_conv")
    assert model.covers([*LAYERS, first]).tolist() == [True, True, False, True]
    assert model.price([LAYERS[1], first]).tolist() == [[2, 0.5], [9, 9]]
    with pytest.raises(UserError, match=r"own\.json \(3 rows\) has no row .*-W2A8 for layer c"):
        model.price(LAYERS)
    assert cost_of(LAYERS[:2], model).latency_ms == 3
    assert cost_of(LAYERS, model).latency_ms is None
    assert model.price([]).shape == (0, 2)


def test_measured_costs_are_those_of_the_layers_names(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("layer,w_bits,a_bits,cost\n1,4,6,7\n0,8,8,5\n")
    model = load_measured(file, ("a", "b", "c"), "energy")
    assert str(model) == f"table {file}"
    assert model.covers(LAYERS).tolist() == [True, True, False]
    assert model.covers([replace(LAYERS[0], w_bits=7), replace(LAYERS[0], a_bits=32)]).tolist() == [False, False]
    np.testing.assert_array_equal(model.price(LAYERS[:2]), [[np.nan, 5], [np.nan, 7]])
    assert layer_quantity(LAYERS[:2], "energy", model).tolist() == [5, 7]
    assert layer_quantity(LAYERS, "size", model).tolist() == layer_quantity(LAYERS, "size").tolist()
    assert layer_quantity(LAYERS[:2], "size", load_measured(file, ("a", "b"), "size")).tolist() == [5, 7]
    with pytest.raises(UserError, match=r"own\.csv has no cost of layer c at 2 weight and 8 activation bits"):
        model.price(LAYERS)
    with pytest.raises(UserError, match=r"table .*own\.csv has no latency"):
        layer_quantity(LAYERS[:2], "latency", model)
    cost = cost_of(LAYERS[:2], model)
    assert (cost.latency_ms, cost.energy_mj) == (None, 12)


def test_flags_need_no_heavy_imports():
    heavy = "{'torch', 'scipy', 'sklearn', 'matplotlib'}"
    code = f"import sys; import lut.cost_model, lut.costs; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
