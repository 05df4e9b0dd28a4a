"""Policies, their costs and how bits are lowered to a budget, against published values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from apq.errors import UserError
from apq.files import write_json
from apq.layers import ConvLayer
from apq.policy import (
    QUANTIZERS,
    Policy,
    PolicyQuantizer,
    layer_names,
    load_strategy,
    policy_from_dict,
    policy_from_strategy,
    policy_to_dict,
    priced_layers,
)
from elastic_nn.training.recipes import RECIPES
from lut.bit_costs import linear_costs, weight_costs
from lut.bitfusion import BitFusion
from lut.costs import cost_of
from lut.measured import load_measured
from lut.table import layer_key, load
from lut.traced import traced_layers
from methods.ddpg.command import build_parser
from methods.ddpg.search import agent_bits
from methods.search.bit_choices import FREE, fixed_bits
from methods.search.bit_environment import BitEnvironment, action_to_bits
from methods.search.bit_search import Task

BITFUSION = BitFusion()


@pytest.fixture(scope="module")
def networks():
    models = {"resnet50": torchvision.models.resnet50(), "mobilenetv2": torchvision.models.mobilenet_v2()}
    return {name: traced_layers(net.to("meta"), 224) for name, net in models.items()}


def kmeans_environment(layers, ratio, min_bit=1):
    costs = weight_costs(layers)
    fixed = fixed_bits(len(layers), activations=False, keep_ends=False)
    return BitEnvironment(
        layers=layers, costs=costs, budget=ratio * costs.reference, fixed=fixed, min_bit=min_bit, max_bit=8
    )


def published_costs(golden, networks):
    layers = networks["mobilenetv2"]
    table = load_measured(golden("haq_latency_table.csv"), layer_names(layers), "latency")
    return linear_costs(layers, "latency", table)


def test_published_kmeans_policies(golden, networks):
    for case in golden("haq.json")["kmeans_policies"]:
        layers = networks[case["model"]]
        policy = policy_from_strategy("kmeans", layers, case["strategy"])
        costs = weight_costs(layers)
        assert costs.ratio(policy.matrix()) == pytest.approx(case["ratio"], rel=1e-12)
        assert costs.total(policy.matrix()) == pytest.approx(case["size_MB"] * 1e6)
        assert policy.strategy == case["strategy"]


def test_published_kmeans_wall(golden, networks):
    for case in golden("haq.json")["kmeans_action_wall"]:
        environment = kmeans_environment(networks[case["model"]], case["preserve_ratio"])
        after = environment.lowered(np.array(case["before"])[:, None])
        assert after[:, 0].tolist() == case["after"]
        assert environment.costs.ratio(after) == pytest.approx(case["ratio_after"])


@pytest.mark.parametrize("image_bits", [7, 8])
def test_published_linear_policies(golden, networks, image_bits):
    """On the layers that the table gives, with both readings of the raw image's bits."""
    costs = published_costs(golden, networks)
    given_layers = ~np.isnan(costs.cells[:, 0, 0])
    assert given_layers.sum() == 27
    for case in golden("haq.json")["linear_policies"]:
        policy = policy_from_strategy("linear", networks["mobilenetv2"], case["strategy"])
        found = costs.per_layer(policy.matrix(image_bits))
        expected = np.array(case["per_layer_cost"])
        same = found[given_layers] == expected[given_layers]
        assert same[1:].all()
        assert same[0] == (image_bits == case["first_layer_cell_used"][0])


def test_published_ratio_with_both_readings(golden, networks):
    """The ratio over all layers; those that the table lacks have their published cost, the first either reading."""
    costs = published_costs(golden, networks)
    case = golden("haq.json")["linear_policies"][0]
    policy = policy_from_strategy("linear", networks["mobilenetv2"], case["strategy"])
    for image_bits, ratio in ((7, 0.59138), (8, 0.59646)):
        found = costs.per_layer(policy.matrix(image_bits))
        total = np.where(np.isnan(found), case["per_layer_cost"], found).sum()
        assert total / case["org_cost_8bit"] == pytest.approx(ratio, abs=5e-6)


def test_published_linear_wall(golden, networks):
    """Every step of the sweeps, on the published totals, with the published cost of layers that the table lacks."""
    layers = networks["mobilenetv2"]
    costs = linear_costs(layers, "bitops", BITFUSION)
    for case in golden("haq.json")["linear_action_wall"]:
        after = np.array(case["after"])
        after[0, 1] = 8
        fixed = fixed_bits(len(layers), activations=True, keep_ends=True)
        before = np.where(fixed == FREE, case["before"], fixed)
        budget = costs.total(after)  # reached by the same steps in the same order, whatever a layer's cost
        environment = BitEnvironment(layers=layers, costs=costs, budget=budget, fixed=fixed, min_bit=2, max_bit=8)
        assert environment.lowered(before).tolist() == after.tolist()


def test_published_actions(golden):
    for case in golden("haq.json")["action_to_bits"]:
        assert action_to_bits(case["action"], case["min_bit"], case["max_bit"]) == case["bits"]


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1.2), st.booleans())
def test_wall_fits_the_budget_and_never_raises_bits(seed, ratio, keep_ends):
    rng = np.random.default_rng(seed)
    layers = [ConvLayer(8, 16, 8, 3, 1, 1, 8, 8, name=str(i)) for i in range(5)]
    costs = linear_costs(layers, "latency", BITFUSION)
    fixed = fixed_bits(5, activations=True, keep_ends=keep_ends)
    make = {"layers": layers, "costs": costs, "fixed": fixed, "min_bit": 2, "max_bit": 8}
    cheapest = BitEnvironment(**make, budget=np.inf).cheapest()
    budget = max(ratio * costs.reference, costs.total(cheapest))
    environment = BitEnvironment(**make, budget=budget)
    raw = environment.fixed.copy()
    raw[fixed == FREE] = rng.integers(2, 9, (fixed == FREE).sum())
    bits = environment.lowered(raw)
    assert costs.total(bits) <= budget
    assert (bits[fixed != FREE] == fixed[fixed != FREE]).all()
    assert (bits >= 2).all()
    assert ((bits <= raw) | (bits == cheapest)).all()
    if costs.total(raw) <= budget:
        assert (bits == raw).all()


def test_wall_steps_equal_one_at_a_time(networks):
    """Cumulative sums against a plain loop."""
    layers, rng = networks["mobilenetv2"], np.random.default_rng(0)
    costs = linear_costs(layers, "latency", BITFUSION)
    fixed = fixed_bits(len(layers), activations=True, keep_ends=True)
    for ratio in (0.6, 0.7, 0.9):
        budget = ratio * costs.reference
        environment = BitEnvironment(layers=layers, costs=costs, budget=budget, fixed=fixed, min_bit=2, max_bit=8)
        bits = np.where(fixed == FREE, rng.integers(2, 9, fixed.shape), fixed)
        expected = bits.copy()
        for _ in range(6):
            for layer in reversed(range(len(layers))):
                for operand in (1, 0):
                    total = costs.total(expected)
                    if total <= budget or fixed[layer, operand] != FREE or expected[layer, operand] == 2:
                        continue
                    expected[layer, operand] -= 1
                    if costs.total(expected) > total + 1e-12:  # fewer bits may cost more: not taken
                        expected[layer, operand] += 1
        assert costs.total(expected) <= budget
        assert (environment.lowered(bits) == expected).all()


def test_hopeless_budget_names_the_cheapest(networks):
    with pytest.raises(UserError, match=r"below the cheapest policy, which needs 3\.18786e\+06 bytes, 0\.03125 of"):
        kmeans_environment(networks["resnet50"], 0.03)


def test_costs_equal_those_of_the_layers(networks):
    layers = networks["mobilenetv2"]
    rng = np.random.default_rng(0)
    bits = rng.integers(2, 9, (len(layers), 2))
    bits[0, 1] = 8  # the image
    policy = Policy(quantizer="linear", names=tuple(x.name for x in layers), bits=tuple(map(tuple, bits.tolist())))
    cost = cost_of(priced_layers(layers, policy), BITFUSION)
    for quantity, expected in (("latency", cost.latency_ms), ("bitops", cost.bitops), ("size", cost.size_bytes)):
        assert linear_costs(layers, quantity, BITFUSION).total(bits) == pytest.approx(expected)


def test_a_layer_that_runs_twice_costs_twice_and_is_stored_once():
    layer = ConvLayer(8, 8, 4, 3, 1, 1, 8, 8, name="conv")
    twice = [layer, replace(layer, shared=True)]
    bits = np.array([[4, 8]])
    once = linear_costs([layer], "bitops", BITFUSION).total(bits)
    assert linear_costs(twice, "bitops", BITFUSION).total(bits) == 2 * once
    assert weight_costs(twice).reference == weight_costs([layer]).reference


def test_policy_on_disk(networks):
    layers = networks["mobilenetv2"]
    bits = tuple((8, -1) if i == 0 else (4, 6) for i in range(len(layers)))
    policy = Policy(quantizer="linear", names=tuple(x.name for x in layers), bits=bits)
    assert policy_from_dict(policy_to_dict(policy, layers)) == (policy, layers)


@pytest.mark.parametrize(
    ("quantizer", "strategy", "message"),
    [
        ("linear", [[8, -1], [4, -1]], r"layer 1 \(b\)"),
        ("linear", [[8, -1], [4, 9]], "from 2 to 8"),
        ("linear", [[8, -1]], "bits for 1 layers, the network has 2"),
        ("linear", [4, 4], "weight bits, activation bits"),
        ("kmeans", [[4, 4], [4, 4]], "must be weight bits"),
        ("kmeans", [0, 4], "from 1 to 8"),
        ("kmeans", [True, 4], "layer 0"),
        ("linear", [[8, 4], [4, 4]], r"layer 0 \(a\)"),  # the image is not quantized again
        ("linear", {"a": 1}, "one entry a layer"),
        ("log", [4, 4], "unknown quantizer"),
    ],
)
def test_bad_policies(quantizer, strategy, message):
    layers = [ConvLayer(8, 8, 4, 1, 1, 1, 8, 8, name=name) for name in "ab"]
    with pytest.raises(UserError, match=message):
        policy_from_strategy(quantizer, layers, strategy)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"fewest": 0, "most": 8}, "from 1 to 8, not 0 to 8"),
        ({"fewest": 4, "most": 3}, "from 1 to 8, not 4 to 3"),
        ({"fewest": 1, "most": 8, "weights_only": True}, "no costs on an accelerator"),
    ],
)
def test_bad_quantizers(row, message):
    with pytest.raises(UserError, match=message):
        PolicyQuantizer(**row)


def test_facts_of_a_quantizer_from_outside_decide(monkeypatch):
    """A quantizer of few weight and activation bits, without costs on an accelerator."""
    monkeypatch.setitem(QUANTIZERS, "powers", PolicyQuantizer(2, 4, priced=False, ratio=0.4))
    words = ["--model", "x", "--quantizer", "powers"]
    config = agent_bits(build_parser().parse_args(words), RECIPES["tiny"])
    assert (config.quantity, config.ratio, config.min_bit, config.max_bit) == ("size", 0.4, 2, 4)
    assert not config.keep_ends
    for more, message in (
        (["--type", "latency"], "powers weights compute in floating point"),
        (["--table", "t.json"], "powers weights have no cost on an accelerator"),
        (["--keep_ends"], "powers has no 8 bits for the first and last layer"),
        (["--max_bit", "5"], "powers bits must be from 2 to 4, not 2 to 5"),
    ):
        with pytest.raises(UserError, match=message):
            agent_bits(build_parser().parse_args([*words, *more]), RECIPES["tiny"])


def test_measured_tables(tmp_path):
    file, layers = tmp_path / "table.csv", [ConvLayer(8, 8, 4, 1, 1, 1, 8, 8, name=name) for name in "abab"]
    for head in ("", "layer,w_bits,a_bits,cost\n"):
        file.write_text(f"{head}0,1,1,5\n0,8,8,7\n")
        for quantity in ("latency", "bitops"):  # the table has costs of whatever the budget limits
            found = linear_costs(layers, quantity, load_measured(file, "ab", quantity))
            assert (found.cells[0, 0, 0], found.reference, found.n_priced) == (5, 7, 1)  # of both runs of the layer
            assert found.unit == "in the unit of its table"
            assert np.isnan(found.cells).sum() == 2 * 64 - 2
    file.write_text("0,1,1,5\n")
    with pytest.raises(UserError, match=r"table\.csv has no latency of a layer at 8 bits, which costs are compared"):
        linear_costs(layers, "latency", load_measured(file, "ab", "latency"))


def test_a_table_of_some_bits_prices_a_search_within_them(tmp_path):
    layers = [ConvLayer(8, 8, 4, 1, 1, 1, 8, 8, name=name) for name in "abcd"]
    numbers = range(2, 9)
    rows = [layer_key(replace(layers[0], w_bits=w, a_bits=a)) for w in numbers for a in numbers]
    write_json(tmp_path / "table.json", {key: {"latency": i + 1, "energy": 1} for i, key in enumerate(rows)})
    costs = linear_costs(layers, "latency", load(tmp_path / "table.json"))
    assert np.isnan(costs.cells[:, 0]).all()
    assert not np.isnan(costs.cells[:, 1:, 1:]).any()
    assert (costs.reference, costs.unit, costs.n_priced) == (4 * 49, "ms", 4)
    make = {"layers": layers, "costs": costs, "budget": 120, "max_bit": 8}
    make["fixed"] = fixed_bits(4, activations=True, keep_ends=True)
    bits = BitEnvironment(**make, min_bit=2).decide(np.ones(4))
    assert costs.total(bits) <= 120
    with pytest.raises(UserError, match=r"lacks layer 1 \(b\) at some of its bits"):
        BitEnvironment(**make, min_bit=1)


def test_bad_tables(tmp_path):
    file = tmp_path / "table.csv"
    for row in ("9,1,1,5", "0,1,1", "0,9,1,5", "0,1,1,nan", "0,1,1,-1", "0,1,1,inf", "zero,1,1,5"):
        file.write_text(f"layer,w,a,cost\n{row}\n")
        with pytest.raises(UserError, match=r"table\.csv is not a table"):
            load_measured(file, "abc", "latency")


def test_strategies_within_a_file(tmp_path):
    write_json(tmp_path / "many.json", {"a": [{"strategy": [1, 2]}, [3]]})
    assert load_strategy(Path(f"{tmp_path}/many.json#/a/0")) == [1, 2]
    assert load_strategy(Path(f"{tmp_path}/many.json#/a/1")) == [3]
    for pointer, message in (("", "holds no policy"), ("#/b", "nothing at /b"), ("#/a/5", "nothing at /a/5")):
        with pytest.raises(UserError, match=message):
            load_strategy(Path(f"{tmp_path}/many.json{pointer}"))


def test_layers_of_an_agent_are_those_of_the_costs():
    """A module that runs again later keeps the position of its first run."""
    layers = [ConvLayer(8, 8, 4, 1, 1, 1, 8, 8, name=name) for name in "abcbd"]
    task = Task(net=None, spec=None, layers=layers, costs=None, cost_model=None)
    assert tuple(layer.name for layer in task.own_layers) == layer_names(layers) == ("a", "b", "c", "d")


def test_nothing_to_choose():
    layers = [ConvLayer(8, 8, 4, 1, 1, 1, 8, 8, name=name) for name in "ab"]
    fixed = fixed_bits(2, activations=True, keep_ends=True)
    with pytest.raises(UserError, match="nothing to choose"):
        BitEnvironment(layers=layers, costs=weight_costs(layers), budget=1e9, fixed=fixed, min_bit=2, max_bit=8)


def test_wall_leaves_what_single_bits_cannot(networks):
    """Here 2-bit depthwise layers cost more than 3-bit ones: only some of them get their cheapest bits."""
    layers = networks["mobilenetv2"]
    costs = linear_costs(layers, "latency", BITFUSION)
    fixed = fixed_bits(len(layers), activations=True, keep_ends=True)
    bits = np.where(fixed == FREE, 2, fixed)
    budget = 0.6 * costs.reference
    assert costs.total(bits) > budget
    environment = BitEnvironment(layers=layers, costs=costs, budget=budget, fixed=fixed, min_bit=2, max_bit=8)
    found = environment.lowered(bits)
    assert costs.total(found) <= budget
    changed = (found != bits).any(axis=1)
    assert 0 < changed.sum() < len(layers) / 2
    assert (found[changed] == environment.cheapest()[changed]).all()
