"""Coarse-to-fine search on synthetic accuracies: spread, front, kernels."""

from __future__ import annotations

import numpy as np
import pytest
from example_spaces import ALL, TINY, brute_force_front, every_row, made_up
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from apq.errors import UserError
from apq.fronts import interval_of, pareto_front
from apq.genes import canonical, cardinalities, forbidden_slots, genes_of, largest_subnet, sample, subnets_of, view
from apq.layers import layers_of
from apq.presets import DIGITS, get_space
from methods.coarse_to_fine.finder import (
    CoarseToFineConfig,
    Measured,
    change_kernels,
    coarse_to_fine,
    perturbed,
    propose,
    quotas,
    skeletons,
    spread,
)
from utils.latency_predictor import LatencyPredictor

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)


def flops_of(space):
    return LatencyPredictor(type="flops", scope="full", space=space).predict


def range_of(space):
    cost = LatencyPredictor(type="flops", scope="full", space=space)
    return cost.cheapest()[0], cost.predict_lat(largest_subnet(space))


def config_of(space, **given):
    low, high = range_of(space)
    return CoarseToFineConfig(**{"flops_min": low, "flops_max": high, "n_coarse": 30, "intervals": 5, **given})


# Cost


@spaces
def test_flops_of_genes_are_those_of_the_layers(space):
    genes = sample(space, 5, np.random.default_rng(0))
    by_layers = [sum(layer.macs for layer in layers_of(space, subnet)) for subnet in subnets_of(space, genes)]
    assert flops_of(space)(genes).tolist() == by_layers


# Spread


@given(n=st.integers(1, 500), intervals=st.integers(1, 50))
def test_quotas_are_even(n, intervals):
    each = quotas(n, intervals)
    assert each.sum() == n
    assert np.ptp(each) <= 1


@given(st.integers(2, 6), st.lists(st.floats(-1, 8, allow_nan=False), max_size=20))
def test_interval_of_by_hand(n, values):
    edges = np.arange(n + 1.0)
    expected = [-1 if v < 0 or v > n else min(int(v), n - 1) for v in values]
    assert interval_of(np.array(values), edges).tolist() == expected


@pytest.mark.parametrize("space", [s for s in ALL.values() if s is not TINY], ids=lambda space: space.name)
def test_every_interval_is_filled_evenly(space):  # TINY has too few networks: see the next test
    config = config_of(space, n_coarse=53, intervals=10)
    genes = spread(space, 53, config.edges, flops_of(space), np.random.default_rng(0))
    counts = np.bincount(interval_of(flops_of(space)(genes), config.edges), minlength=10)
    assert counts.tolist() == quotas(53, 10).tolist()
    assert len(np.unique(genes, axis=0)) == 53
    assert np.array_equal(genes, canonical(space, genes))
    assert not forbidden_slots(space, genes).any()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(4, 200), intervals=st.integers(1, 4))
def test_a_small_space_gives_all_that_an_interval_has(seed, n, intervals):
    rows = every_row(TINY)
    bits = view(TINY, rows).bits
    rows = rows[(bits == cardinalities(TINY)[8] - 1).all(axis=(1, 2))]  # at the highest bits
    config = config_of(TINY, n_coarse=n, intervals=intervals)
    there = np.bincount(interval_of(flops_of(TINY)(rows), config.edges), minlength=intervals)
    genes = spread(TINY, n, config.edges, flops_of(TINY), np.random.default_rng(seed))
    found = np.bincount(interval_of(flops_of(TINY)(genes), config.edges), minlength=intervals)
    assert found.tolist() == np.minimum(there, quotas(n, intervals)).tolist()


def test_the_paper_s_range_is_filled():
    space = get_space("oqa-mbv3")
    edges = np.linspace(50e6, 300e6, 11)
    genes = spread(space, 10_000, edges, flops_of(space), np.random.default_rng(0))
    assert np.bincount(interval_of(flops_of(space)(genes), edges)).tolist() == [1000] * 10


@spaces
def test_proposals_reach_all_choices_and_keep_the_bits(space):
    genes = np.concatenate([propose(space, 2000, number, np.random.default_rng(number)) for number in (0, 5)])
    highest = view(space, genes_of(space, [largest_subnet(space)]))
    parts, counts = view(space, genes), view(space, cardinalities(space)[None])
    assert (parts.bits == highest.bits).all()
    assert (parts.shared_bits == highest.shared_bits).all()
    assert [len(np.unique(column)) for column in parts.d.T] == counts.d[0].tolist()
    assert len(np.unique(parts.ks[:, 0])) == len(space.kernel_sizes)
    assert (parts.d == counts.d - 1).all(
        axis=1
    ).mean() > 0.05  # a uniform choice makes it so at 3^-5 in the published spaces


# Front


@given(st.integers(0, 30).flatmap(lambda n: st.tuples(*[arrays(float, n, elements=st.integers(0, 8).map(float))] * 2)))
def test_pareto_front_is_that_by_brute_force(points):
    costs, values = points
    front = pareto_front(costs, values)
    found = list(zip(costs[front].tolist(), values[front].tolist(), strict=True))
    assert found == sorted(found)
    assert len(found) == len(set(found))
    assert set(found) == brute_force_front(costs, values)


def test_of_equal_points_the_first_is_in_the_front():
    assert pareto_front(np.array([2.0, 1.0, 1.0]), np.array([0.5, 0.4, 0.4])).tolist() == [1, 0]


# Kernels


@spaces
def test_only_kernels_that_run_change(space):
    rng = np.random.default_rng(0)
    before = propose(space, 300, 0, rng)
    after = change_kernels(space, before, 0.5, rng)
    kernels = slice(0, len(space.slots))
    assert np.array_equal(np.delete(before, kernels, axis=1), np.delete(after, kernels, axis=1))
    assert np.array_equal(after, canonical(space, after))
    assert np.array_equal(change_kernels(space, before, 0.0, rng), before)
    assert (before != after).any()


def test_each_kernel_changes_as_often_as_asked():
    before = np.repeat(genes_of(DIGITS, [largest_subnet(DIGITS)]), 20_000, axis=0)
    changed = change_kernels(DIGITS, before, 0.3, np.random.default_rng(0)) != before
    assert changed[:, : len(DIGITS.slots)].mean(axis=0) == pytest.approx(0.3, abs=0.02)
    every = change_kernels(DIGITS, before, 1.0, np.random.default_rng(0))
    assert (every[:, : len(DIGITS.slots)] != before[:, : len(DIGITS.slots)]).all()


@spaces
def test_the_fine_stage_keeps_skeletons(space):
    config = config_of(space, n_fine=3)
    found = coarse_to_fine(space, config, flops_of(space), lambda stage, genes: made_up(space)(genes))
    front = found.coarse_front()
    slots = len(space.slots)
    assert len(np.unique(found.genes, axis=0)) == len(found.genes)
    fine = found.genes[found.n_coarse :]
    bare = {tuple(row) for row in found.genes[front][:, slots:]}
    assert {tuple(row) for row in fine[:, slots:]} <= bare
    assert 0 < len(fine) <= 3 * len(bare)
    assert ((found.flops >= config.flops_min) & (found.flops <= config.flops_max)).all()
    assert set(zip(found.flops[found.front()], found.top1[found.front()], strict=True)) == brute_force_front(
        found.flops, found.top1
    )


def test_a_skeleton_is_varied_from_its_best_kernels():
    small, large = genes_of(DIGITS, [largest_subnet(DIGITS)] * 2)
    small = small.copy()
    small[0] = 0  # a smaller kernel: the same skeleton
    other = canonical(DIGITS, np.zeros((1, len(small)), dtype=np.int64))[0]
    genes = np.stack([small, other, large])
    found = Measured(genes, flops_of(DIGITS)(genes), np.array([0.8, 0.2, 0.9]), 3)
    assert found.coarse_front().tolist() == [1, 0, 2]
    assert skeletons(DIGITS, found).tolist() == [1, 2]
    fine = perturbed(DIGITS, genes, skeletons(DIGITS, found), config_of(DIGITS, n_fine=4), flops_of(DIGITS))
    assert len(fine) == 8
    assert not (fine[:, None] == genes).all(axis=2).any()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"flops_min": 5.0, "flops_max": 5.0}, "must be below"),
        ({"flops_min": float("nan")}, "must be below"),
        ({"flops_max": float("inf")}, "must be below"),
        ({"n_coarse": 3, "intervals": 4}, "over 4 intervals"),
        ({"n_fine": -1}, "n_fine"),
        ({"kernel_prob": 0.0}, "kernel_prob"),
        ({"kernel_prob": 1.1}, "kernel_prob"),
    ],
)
def test_settings_check_themselves(given, match):
    with pytest.raises(UserError, match=match):
        config_of(DIGITS, **given)


def test_a_range_without_subnets_is_a_user_error():
    config = config_of(DIGITS, flops_min=1.0, flops_max=2.0)
    with pytest.raises(UserError, match="no subnet of space digits"):
        coarse_to_fine(DIGITS, config, flops_of(DIGITS), lambda stage, genes: made_up(DIGITS)(genes))
