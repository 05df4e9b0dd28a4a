"""HAQ's observations and action walls, against values of its published code."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torchvision

from lut.bit_costs import BitCosts, linear_costs, weight_costs
from lut.bit_serial import BitSerial
from lut.bitfusion import BitFusion
from lut.traced import traced_layers
from methods.search.agent import Agent
from methods.search.bit_choices import fixed_bits
from methods.search.bit_environment import BitEnvironment, action_to_bits
from methods.search.bit_search import Task, environment_of, policy_of_bits
from methods.search.settings import AgentConfig, BitSearch

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


def published_costs(golden, layers):
    """The published table. Rows of odd layers, which the golden values lack, are those of HAQ's accelerator."""
    accelerator = BitSerial()
    numbers = range(1, 9)
    at_bits = [replace(layer, w_bits=w, a_bits=a) for layer in layers for w in numbers for a in numbers]
    cells = accelerator.cycles(at_bits).reshape(len(layers), 8, 8)
    with golden("haq_latency_table.csv").open() as file:
        for row in csv.DictReader(file):
            layer, w, a = (int(row[name]) for name in ("layer", "w_bits", "a_bits"))
            cells[layer, w - 1, a - 1] = float(row["latency"])
    for case in golden("haq.json")["linear_policies"]:  # every row that is known, also of odd layers
        found = [cells[i, w - 1, a - 1 if a > 0 else 6] for i, (w, a) in enumerate(case["strategy"])]
        assert found == case["per_layer_cost"]
    return BitCosts(cells=cells, unit="cycles", reference=float(cells[:, 7, 7].sum()), of_what="the 8-bit cost")


def test_published_walls_of_linear(golden):
    data, layers = golden("haq_states.json"), layers_of("qmobilenetv2_100_classes")
    expected, costs = data["linear"]["qmobilenetv2_100_classes"], published_costs(golden, layers)
    assert costs.reference == expected["org_cost"]
    task = Task(net=None, spec=None, layers=layers, costs=costs, cost_model=None)
    settings = {"quantizer": "linear", "quantity": "latency", "min_bit": 2, "max_bit": 8, "keep_ends": True}
    settings |= {"train_images": 2, "val_images": 1, "image_bits": 7, "steps": "all"}
    n = 0
    for wall in expected["walls"]:
        actions = actions_of(wall["case"], len(layers), 2, data["SEED"])
        assert action_to_bits(actions, 2, 8).tolist() == wall["raw"]
        for ratio in wall.keys() - {"case", "raw"}:
            found = environment_of(task, BitSearch(ratio=float(ratio), **settings))
            bits = found.decide(actions)
            assert policy_of_bits(layers, "linear", bits).matrix(-1).ravel().tolist() == wall[ratio]["final"]
            assert found.costs.ratio(bits) == pytest.approx(wall[ratio]["ratio"], abs=1e-11, rel=0)
            n += 1
    assert n >= 40


def test_fixed_operands_have_no_steps_by_default():
    """The rows of the others are the same. With all steps, actions on fixed operands change no bits."""
    layers = layers_of("mobilenetv2")
    free, every = (environment(layers, "linear", every_operand=every) for every in (False, True))
    assert (len(free.observations()), len(every.observations())) == (2 * (len(layers) - 2), 2 * len(layers))
    few, all_rows = free.observations().rows, every.observations().rows
    np.testing.assert_array_equal(few[1:], all_rows[3:-2])
    assert few[0, -1] == 1  # the first step
    np.testing.assert_array_equal(few[0, :-1], all_rows[2, :-1])
    actions = np.random.default_rng(0).random(2 * len(layers))
    other = np.where(np.arange(len(actions)) < 2, 1 - actions, actions)
    np.testing.assert_array_equal(every.decide(actions), every.decide(other))
    np.testing.assert_array_equal(every.decide(actions), free.decide(actions[2:-2]))
    assert every.decide(actions)[[0, -1]].tolist() == [[8, 8], [8, 8]]


def test_agent_learns_from_bits_that_were_taken():
    """What is replayed are the published rows, with bits instead of actions; and the agent acts on it."""
    layers = layers_of("mobilenetv2")
    for kind, last, unit in (("linear", -2, 8), ("kmeans", -1, 1)):
        found = environment(layers, kind, every_operand=False)
        observed = found.observations()
        agent = Agent(observed, AgentConfig(warmup=0, hidden=8, noise=1e-9))
        for _ in range(2):
            states, actions = agent.act()
            bits = raw_bits(actions, kind)
            np.testing.assert_allclose(states[1:, last], bits[:-1] / unit)
            agent.observe(states, actions, 0.0)
        np.testing.assert_array_equal(agent.replay.states[1], states.astype(np.float32))
        with torch.no_grad():  # the second episode was acted, not drawn
            expected = agent.actor(torch.from_numpy(states).float()).sigmoid().squeeze(1)
        np.testing.assert_allclose(actions, expected, atol=1e-5)


def test_the_start_of_an_episode_survives_a_resume():
    found = environment(layers_of("mobilenetv2"), "linear")
    agent, again = (Agent(found.observations(), AgentConfig(episodes=3, warmup=3)) for _ in range(2))
    agent.observe(*agent.act(), 0.5)
    assert agent.first != again.first
    again.check_state(agent.state_dict())
    again.load_state_dict(agent.state_dict())
    for one, other in zip(agent.act(), again.act(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_linear_layers_have_no_stride_and_their_inputs_as_places():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, 1, 1),
        torch.nn.Conv2d(4, 4, 3, 2, 1, groups=4),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    layers = traced_layers(net, 8, in_channels=1)
    assert [layer.linear for layer in layers] == [False, False, True]
    rows = environment(layers, "kmeans").layer_rows()
    # by hand; of one input channel and one group the code of HAQ says depthwise
    np.testing.assert_allclose(rows[:, 0], [1, 1, 0])
    np.testing.assert_allclose(rows[:, 3], [0.5, 1, 0])
    np.testing.assert_allclose(rows[:, 4], [1, 1, 0])
    assert rows[:, 6].tolist() == [64, 64, 64]  # 8 x 8, 8 x 8 and 64 inputs: a constant column stays
    assert rows[:, 8].tolist() == [4, 4, 4]
