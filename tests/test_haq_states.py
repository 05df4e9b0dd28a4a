"""HAQ's observations and action walls, against values of its published code."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torchvision

from lut.bit_costs import linear_costs, weight_costs
from lut.bitfusion import BitFusion
from lut.traced import traced_layers
from methods.search.agent import Agent
from methods.search.bit_environment import BitEnvironment, fixed_bits
from methods.search.settings import AgentConfig

NETWORKS = {
    "qmobilenetv2_100_classes": ("mobilenet_v2", 100),
    "resnet50": ("resnet50", 1000),
    "mobilenetv2": ("mobilenet_v2", 1000),
}
CASES = [("linear", "qmobilenetv2_100_classes"), ("kmeans", "resnet50"), ("kmeans", "mobilenetv2")]


@cache
def layers_of(name):
    arch, n_classes = NETWORKS[name]
    return traced_layers(torchvision.models.get_model(arch, num_classes=n_classes).to("meta"), 224)


def environment(layers, kind, budget=np.inf, costs=None, every_operand=True):
    """HAQ's environment: bits from 2 (linear) or 1, 8 at the ends of linear networks."""
    linear = kind == "linear"
    if costs is None:
        costs = linear_costs(layers, "bitops", BitFusion()) if linear else weight_costs(layers)
    return BitEnvironment(
        layers=layers,
        costs=costs,
        budget=budget,
        fixed=fixed_bits(len(layers), activations=linear, keep_ends=linear),
        min_bit=2 if linear else 1,
        max_bit=8,
        every_operand=every_operand,
    )


def actions_of(case, n_layers, width, seed):
    """The actions of a case, as the README of the golden values draws them."""
    u = np.random.default_rng(seed + 1000 * (case + 1)).random((n_layers, width))
    return (0.3 + 0.7 * u if case < 20 else 0.5 + 0.5 * u).ravel()


def raw_bits(actions, kind):
    """HAQ's rounding of actions, written down by hand."""
    lowest = 2 if kind == "linear" else 1
    return np.round((8 - lowest + 1) * actions + lowest - 0.5).astype(int)


def test_actions_are_those_of_the_golden_values(golden):
    data = golden("haq_states.json")
    for case, first in zip((0, 20), data["action_check"], strict=True):
        assert actions_of(case, 2, 2, data["SEED"]).tolist() == first


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_published_observations(golden, kind, name):
    """Initial rows, every step of an episode, and the first step of the next one."""
    data = golden("haq_states.json")
    expected, layers = data[kind][name], layers_of(name)
    found = environment(layers, kind)
    initial = np.array(expected["initial"])
    np.testing.assert_allclose(found.layer_rows(), initial, rtol=0, atol=1e-12)

    observed, changed = found.observations(), 2 if kind == "linear" else 1
    actions = actions_of(expected["action_case"], len(layers), changed, data["SEED"])
    agent = Agent(observed, AgentConfig(episodes=2, warmup=2))
    states = observed.episode(actions, agent.first)
    np.testing.assert_allclose(states[0], expected["first_observation"], rtol=0, atol=1e-12)
    *following, repeated = expected["steps"]  # the last one follows the end
    assert repeated == following[-1]
    for state, (row, *last) in zip(states[1:], following, strict=True):
        np.testing.assert_allclose(state, [*initial[row, :-changed], *last], rtol=0, atol=1e-12)
    agent.observe(states, actions, 0.0)
    again, _ = agent.act()
    np.testing.assert_allclose(again[0], expected["first_observation_of_next_episode"], rtol=0, atol=1e-12)


def test_published_observations_of_1000_classes(golden):
    expected = golden("haq_states.json")["linear"]["qmobilenetv2_100_classes"]
    rows = environment(layers_of("mobilenetv2"), "linear").layer_rows()
    np.testing.assert_allclose(rows[-1], expected["initial_1000_classes_last_layer"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(rows[:, 5], expected["initial_1000_classes_weights_column"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2"])
def test_published_walls_of_kmeans(golden, name):
    data, layers = golden("haq_states.json"), layers_of(name)
    expected, costs = data["kmeans"][name], weight_costs(layers)
    assert 8 * costs.reference == expected["org_weight_bits"]
    n = 0
    for wall in expected["walls"]:
        actions = actions_of(wall["case"], len(layers), 1, data["SEED"])
        for ratio, after in wall.items():
            if ratio in ("case", "raw"):
                continue
            found = environment(layers, "kmeans", float(ratio) * costs.reference)
            assert found.raw_bits(actions)[:, 0].tolist() == wall["raw"]
            bits = found.decide(actions)
            assert bits[:, 0].tolist() == after["final"]
            assert costs.ratio(bits) == pytest.approx(after["ratio"], abs=1e-11, rel=0)
            n += 1
    assert n >= 40
