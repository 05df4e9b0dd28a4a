from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from example_spaces import ALL, TINY, WIDE, every_row
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from apq.files import write_json
from apq.genes import canonical, cardinalities, forbidden_slots, sample, subnets_of
from apq.layers import layers_of
from apq.presets import APQ_IMAGENET, DIGITS
from apq.space import SCOPES
from apq.subnet import architecture_of, policy_of
from lut.accelerator import Accelerator
from lut.bit_serial import BitSerial
from lut.bitfusion import BitFusion
from lut.cost_model import CostModel
from lut.costs import UNITS, layer_quantity
from lut.population import PopulationCost
from lut.table import build, load
from utils.converter import Converter
from utils.latency_predictor import LatencyPredictor

# Pricing the 15,495 layers of qfa-mbv3 one by one takes long; its twin has the same kinds of them.
PRICED = {name: space for name, space in ALL.items() if name != "qfa-mbv3"}
PRICED["fine"] = replace(TINY, name="fine", channel_step=1, resolutions=tuple(range(16, 40)))
spaces = pytest.mark.parametrize("space", PRICED.values(), ids=PRICED)
types = pytest.mark.parametrize("quantity", UNITS)
BUILT = {}


def predictor_of(space, quantity, scope="published"):
    key = space.name, quantity, scope
    if key not in BUILT:
        BUILT[key] = LatencyPredictor(type=quantity, scope=scope, space=space)
    return BUILT[key]


def test_published_costs(golden):
    latency, energy = predictor_of(APQ_IMAGENET, "latency"), predictor_of(APQ_IMAGENET, "energy")
    for row in golden("apq_cost.json")["rows"]:
        assert latency.predict_lat(row["spec"]) == pytest.approx(row["latency_ms"], rel=1e-3)
        assert energy.predict_lat(row["spec"]) == pytest.approx(row["energy_mJ"], rel=1e-2)


@spaces
@types
@given(seed=st.integers(0, 2**32 - 1), scope=st.sampled_from(SCOPES))
@settings(max_examples=5)
def test_equals_the_sum_over_the_layers_that_run(space, quantity, seed, scope):
    genes = sample(space, 4, np.random.default_rng(seed))
    predicted = predictor_of(space, quantity, scope).predict(genes)
    assert predicted.dtype == np.float64
    networks = [layers_of(space, net, scope) for net in subnets_of(space, genes)]
    direct = [layer_quantity(layers, quantity, BitFusion()).sum() for layers in networks]
    assert predicted == pytest.approx(direct, rel=1e-12)


@spaces
@types
def test_one_spec_costs_what_its_row_costs(space, quantity):
    predictor = predictor_of(space, quantity)
    genes = sample(space, 3, np.random.default_rng(0))
    for row, net in zip(genes, subnets_of(space, genes), strict=True):
        spec = {**architecture_of(space, net), **policy_of(space, net)}
        cost = predictor.predict_lat(spec)
        assert isinstance(cost, float)
        assert cost == predictor.predict_lat(net) == predictor.predict(row[None])[0]
    many = sample(space, 40, np.random.default_rng(1))
    alone = [predictor.predict(row[None])[0] for row in many]
    assert predictor.predict(many).tolist() == alone  # to the last digit
    assert predictor.predict(genes[:0]).shape == (0,)
    assert predictor.unit == UNITS[quantity]


@spaces
def test_idle_slots_cost_nothing(space):
    rng = np.random.default_rng(0)
    genes = rng.integers(cardinalities(space), size=(200, len(cardinalities(space))))
    for quantity in UNITS:
        predict = predictor_of(space, quantity).predict
        assert np.array_equal(predict(genes), predict(canonical(space, genes)))


@pytest.mark.parametrize("space", [s for s in PRICED.values() if s.name != "wide"], ids=lambda s: s.name)
def test_forbidden_blocks_cost_infinity(space):
    rng = np.random.default_rng(0)
    genes = canonical(space, rng.integers(cardinalities(space), size=(200, len(cardinalities(space)))))
    costs = predictor_of(space, "latency").predict(genes)
    joined = {space.operands[space.kind_of("depthwise", operand)].name for operand in "wa"}
    assert {rule.operand for rule in space.forbidden} <= joined
    assert np.array_equal(np.isinf(costs), forbidden_slots(space, genes).any(axis=1))
    assert not np.isnan(costs).any()


@types
@pytest.mark.parametrize("scope", SCOPES)
def test_cheapest_is_the_minimum_by_brute_force(quantity, scope):
    predictor = predictor_of(TINY, quantity, scope)
    cost, subnet = predictor.cheapest()
    assert cost == pytest.approx(predictor.predict(every_row(TINY)).min(), rel=1e-12)
    assert predictor.predict_lat(subnet) == cost


@spaces
@types
def test_cheapest_is_legal_and_below_all_samples(space, quantity):
    predictor = predictor_of(space, quantity)
    cost, subnet = predictor.cheapest()
    row = predictor.cheapest_genes()[None]
    assert subnets_of(space, row) == [subnet]
    assert not forbidden_slots(space, row).any()
    assert 0 < cost <= predictor.predict(sample(space, 2000, np.random.default_rng(0))).min()


def test_more_bits_cost_more():
    spec = Converter(APQ_IMAGENET, seed=0).random_spec()
    lists = {kind.setting: [4] * 21 for kind in APQ_IMAGENET.operands}
    low = {**spec, **lists, "ks": [3] * 21}
    high = {**spec, **{key: [8] * 21 for key in lists}, "ks": [3] * 21}
    for quantity in UNITS:
        predictor = predictor_of(APQ_IMAGENET, quantity)
        if quantity == "flops":
            assert predictor.predict_lat(low) == predictor.predict_lat(high)
        else:
            assert predictor.predict_lat(low) < predictor.predict_lat(high)


def test_bitops_and_bytes_by_hand():
    net = subnets_of(TINY, np.zeros((1, 15), dtype=np.int64))[0]  # 16 px, 8 channels everywhere, 3x3, 4 bits
    assert net.bits == ((4, 8, 4), (4, 8, 4))
    stem, slots, mix = 8 * 9 * 64 * 64, (8 * 8 * 64 + 8 * 9 * 16 + 8 * 8 * 16) * 16, 16 * 16 * 16 * 64
    last = (8 * 8 * 16 + 8 * 9 * 16 + 8 * 16 * 16) * 16
    assert predictor_of(TINY, "bitops").predict_lat(net) == stem + slots + last + mix
    weights = 8 * 9 + (8 * 8 + 8 * 9 + 8 * 8) / 2 + (8 * 8 + 8 * 9 + 8 * 16) / 2 + 16 * 16
    assert predictor_of(TINY, "size").predict_lat(net) == weights + 8 * (8 + 24 + 32 + 16)  # a multiplier and a bias


def test_another_accelerator_costs_otherwise():
    slow = LatencyPredictor(type="latency", space=DIGITS, accelerator=Accelerator(clock_mhz=250.0))
    genes = sample(DIGITS, 5, np.random.default_rng(0))
    assert slow.predict(genes) == pytest.approx(2 * predictor_of(DIGITS, "latency").predict(genes))


def test_a_table_of_ones_own_device_replaces_the_model(tmp_path):
    rows = {key: {"latency": 2.0, "energy": 3.0} for key in build(DIGITS, BitFusion())}
    write_json(tmp_path / "own.json", rows)
    table = load(tmp_path / "own.json")
    net = subnets_of(DIGITS, sample(DIGITS, 1, np.random.default_rng(0)))[0]
    n_layers = len(layers_of(DIGITS, net, "published"))
    for quantity, each in (("latency", 2.0), ("energy", 3.0)):
        assert (
            LatencyPredictor(type=quantity, scope="published", space=DIGITS, table=table).predict_lat(net)
            == each * n_layers
        )
    with pytest.raises(UserError, match=r"own\.json"):
        LatencyPredictor(type="latency", scope="published", space=APQ_IMAGENET, table=table)


@pytest.mark.parametrize("cost_model", [BitFusion(Accelerator(max_bits=4)), BitSerial(max_bits=4)])
def test_a_layer_of_a_slot_without_a_price_is_named(cost_model):
    with pytest.raises(UserError, match=r"cannot price layer blocks\.1\.expand .*at most 4 bits"):
        PopulationCost(replace(TINY, end_bits=4, fixed_bits=4, mix_activation_bits=4), "latency", cost_model)


class Roofline(CostModel):
    """A cost model from outside, which prices a list of layers and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def price(self, layers):
        self.asked += layers
        macs = np.array([layer.macs for layer in layers], dtype=np.float64)
        return np.stack([macs, 2 * macs], axis=1)


def test_a_model_that_prices_lists_is_asked_for_each_layer_once_by_name():
    model, genes = Roofline(), sample(WIDE, 20, np.random.default_rng(0))
    assert np.array_equal(
        PopulationCost(WIDE, "latency", model).predict(genes), PopulationCost(WIDE, "flops").predict(genes)
    )
    assert len(set(model.asked)) == len(model.asked)
    assert set(model.asked) >= {layer for net in subnets_of(WIDE, genes) for layer in layers_of(WIDE, net)}
    assert all(layer.name for layer in model.asked)


def test_layer_quantities_are_the_cost_models_own():
    layers = layers_of(DIGITS, subnets_of(DIGITS, sample(DIGITS, 1, np.random.default_rng(0)))[0])
    assert np.array_equal(layer_quantity(layers, "energy", BitFusion()), BitFusion().cost(layers).energy_mj)


@pytest.mark.parametrize("quantity", ["latency", "energy"])
def test_a_price_needs_a_cost_model(quantity):
    """A forgotten argument must not price on another chip. What is counted needs none."""
    layers = layers_of(DIGITS, subnets_of(DIGITS, sample(DIGITS, 1, np.random.default_rng(0)))[0])
    with pytest.raises(UserError, match=f"{quantity} needs a cost model"):
        layer_quantity(layers, quantity)
    with pytest.raises(UserError, match=f"{quantity} needs a cost model"):
        PopulationCost(TINY, quantity)
    with pytest.raises(TypeError, match="cost_model"):
        build(DIGITS)
    for counted in set(UNITS) - {"latency", "energy"}:
        assert layer_quantity(layers, counted).tolist() == layer_quantity(layers, counted, BitFusion()).tolist()


def test_published_positional_arguments(golden):
    """The published order is platform, type, batch; its only table is of BitFusion at batch 1."""
    row = golden("apq_cost.json")["rows"][0]
    assert LatencyPredictor("BitFusion", "energy", 1).predict_lat(row["spec"]) == pytest.approx(
        row["energy_mJ"], rel=1e-2
    )
    for arguments in (("latency",), ("BitFusion", "latency", 16)):
        with pytest.raises(UserError, match="prices BitFusion at batch 1"):
            LatencyPredictor(*arguments)


@pytest.mark.parametrize(("arguments", "message"), [({"type": "speed"}, "latency, energy"), ({"scope": "all"}, "full")])
def test_unknown_names_are_refused_with_the_known_ones(arguments, message):
    with pytest.raises(UserError, match=message):
        LatencyPredictor(space=TINY, **arguments)
