"""Coarse-to-fine search on made-up accuracies: the spread, the front, the kernels, and what a killed run repeats."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from example_spaces import ALL, TINY, every_row
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import methods.coarse_to_fine.command as command
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, read_jsonl, write_json
from apq.genes import canonical, cardinalities, forbidden_slots, genes_of, largest_subnet, sample, subnets_of, view
from apq.layers import layers_of
from apq.presets import DIGITS, get_space
from apq.subnet import subnet_from_spec
from elastic_nn.networks.subnet_file import load_finetuned
from methods.coarse_to_fine.finder import (
    CoarseToFineConfig,
    Measured,
    change_kernels,
    coarse_to_fine,
    interval_of,
    pareto_front,
    perturbed,
    propose,
    quotas,
    skeletons,
    spread,
)
from utils.latency_predictor import LatencyPredictor

search, report, quant_aware = (script(name) for name in ("search", "test", "quant_aware"))
spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)


def flops_of(space):
    return LatencyPredictor("flops", "full", space).predict


def range_of(space):
    cost = LatencyPredictor("flops", "full", space)
    return cost.cheapest()[0], cost.predict_lat(largest_subnet(space))


def config_of(space, **given):
    low, high = range_of(space)
    return CoarseToFineConfig(**{"flops_min": low, "flops_max": high, "n_coarse": 30, "intervals": 5, **given})


def made_up(space, seed=0):
    """A top-1 that grows with every gene, and no two are alike."""
    worth = np.random.default_rng(seed).uniform(0.1, 1, len(cardinalities(space)))
    return lambda genes: 0.2 + 0.6 * np.tanh(genes @ worth / worth.sum())


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


@spaces
def test_every_interval_is_filled_evenly(space):
    config = config_of(space, n_coarse=53, intervals=10)
    genes = spread(space, 53, config.edges, flops_of(space), np.random.default_rng(0))
    if space.name == "tiny":
        return  # it has too few networks: see the next test
    counts = np.bincount(interval_of(flops_of(space)(genes), config.edges), minlength=10)
    assert counts.tolist() == quotas(53, 10).tolist()
    assert len(np.unique(genes, axis=0)) == 53
    assert np.array_equal(genes, canonical(space, genes))
    assert not forbidden_slots(space, genes).any()


@settings(max_examples=15, deadline=None)
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
    highest = view(space, genes_of(space, [largest_subnet(space)])).bits[0]
    parts, depths = view(space, genes), cardinalities(space)[-1 - len(space.stages) : -1]
    assert (parts.bits == highest).all()
    assert [len(np.unique(column)) for column in parts.d.T] == depths.tolist()
    assert len(np.unique(parts.ks[:, 0])) == len(space.kernel_sizes)
    assert (parts.d == depths - 1).all(
        axis=1
    ).mean() > 0.05  # a uniform choice makes it so at 3^-5 in the published spaces


# Front


def brute_force_front(costs, values):
    points = set(zip(costs.tolist(), values.tolist(), strict=True))
    return {(c, v) for c, v in points if not any(c2 <= c and v2 >= v and (c2, v2) != (c, v) for c2, v2 in points)}


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


def test_a_range_without_subnets_is_told():
    config = config_of(DIGITS, flops_min=1.0, flops_max=2.0)
    with pytest.raises(UserError, match="no subnet of space digits"):
        coarse_to_fine(DIGITS, config, flops_of(DIGITS), lambda stage, genes: made_up(DIGITS)(genes))


# The command


FLAGS = ["--mode", "coarse_to_fine", "--n_coarse", "12", "--intervals", "4", "--n_fine", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the shipped supernet, whose subnets are measured by a made-up rule; counts the calls."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    calls = []

    def top1(self, subnet):
        calls.append(subnet)
        return float(made_up(DIGITS)(genes_of(DIGITS, [subnet]))[0])

    monkeypatch.setattr(command.Measurement, "top1", top1)
    return tmp_path, calls


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.suffix != ".png"}


def test_the_experiment_is_whole(here, capsys):
    root, calls = here
    search([*FLAGS, "--exp_name", "a", "--json"])
    shown = json.loads(capsys.readouterr().out)
    records, front = read_jsonl(root / "exps/a/evaluated.jsonl"), read_json(root / "exps/a/front.json")
    assert len(records) == len(calls) == sum(shown["measured"].values())
    assert [r["index"] for r in records if r["stage"] == "coarse"] == list(range(12))
    assert set(records[0]) == {"stage", "index", "arch", "policy", "flops", "top1"}
    points = {(r["flops"], r["top1"]) for r in records}
    assert {(r["flops"], r["top1"]) for r in front} == brute_force_front(*map(np.array, zip(*points, strict=True)))
    assert [r["flops"] for r in front] == sorted(r["flops"] for r in front)
    for entry in front:
        layers = layers_of(DIGITS, subnet_from_spec(DIGITS, {**entry["arch"], **entry["policy"]}))
        assert entry["flops"] == sum(layer.macs for layer in layers)
        assert entry["bitops"] == sum(layer.bitops for layer in layers) == 64 * entry["weighted_flops"]
    best = front[-1]  # without a constraint the most accurate one
    assert read_json(root / "exps/a/arch") == [best["arch"], best["policy"]]
    assert read_json(root / "exps/a/acc") == [best["top1"]] == [shown["top1"]]
    assert read_json(root / "exps/a/lat") == [best["flops"]]
    _, space, _, images = load_finetuned(Experiment(root / "exps/a"))
    assert (space, images) == (DIGITS, read_json(root / "exps/a/evaluated.json")["images"])
    assert not list(root.glob("exps/a/.*"))


def test_a_killed_search_continues_and_finds_the_same(here, monkeypatch):
    root, calls = here
    search([*FLAGS, "--exp_name", "whole"])
    n, whole = len(calls), files_of(root / "exps/whole")
    measured = command.Measurement.top1
    for killed_after in (5, 14):  # in the coarse stage, in the fine one

        def top1(self, subnet, killed_after=killed_after):
            if len(calls) == killed_after:
                raise KeyboardInterrupt
            return measured(self, subnet)

        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(command.Measurement, "top1", top1)
            with pytest.raises(KeyboardInterrupt):
                search([*FLAGS, "--exp_name", f"killed-{killed_after}"])
        folder = root / f"exps/killed-{killed_after}"
        assert not (folder / "arch").exists()
        with (folder / "evaluated.jsonl").open("a") as file:
            file.write('{"stage": "coa')  # torn
        search([*FLAGS, "--exp_name", folder.name])
        assert len(calls) == n
        assert files_of(folder) == whole


def test_another_constraint_chooses_again_without_measuring(here):
    root, calls = here
    flags = [*FLAGS, "--flops_min", "2e5"]  # so that the cheapest subnet of the space is not measured
    search([*flags, "--exp_name", "a"])
    front, before = read_json(root / "exps/a/front.json"), files_of(root / "exps/a")
    calls.clear()
    for entry, following in itertools.pairwise(front[:3]):
        search([*flags, "--exp_name", "a", "--constraint", str(following["flops"] - 1)])
        assert read_json(root / "exps/a/arch") == [entry["arch"], entry["policy"]]
        assert read_json(root / "exps/a/config.json")["constraint"] == following["flops"] - 1
    search([*flags, "--exp_name", "a", "--constraint", "2e7", "--type", "bitops"])
    assert 0 < read_json(root / "exps/a/lat")[0] <= 2e7
    assert calls == []
    search([*flags, "--exp_name", "a"])
    assert files_of(root / "exps/a") == before
    cheapest = front[0]["flops"]
    with pytest.raises(UserError, match=f"cheapest measured subnet, which needs {cheapest:.6g} MACs"):
        search([*flags, "--exp_name", "a", "--constraint", str((cheapest + range_of(DIGITS)[0]) / 2)])
    assert files_of(root / "exps/a") == before


def test_what_may_not_be_replaced_is_kept(here):
    root, _ = here
    search([*FLAGS, "--exp_name", "a"])
    with pytest.raises(UserError, match=r"other coarse_to_fine.*--overwrite"):
        search([*FLAGS, "--exp_name", "a", "--seed", "1"])
    first = (root / "exps/a/evaluated.jsonl").read_text()
    search([*FLAGS, "--exp_name", "a", "--seed", "1", "--overwrite"])
    assert (root / "exps/a/evaluated.jsonl").read_text() != first
    path = root / "exps/a/checkpoint/model_best.pth.tar"
    torch.save({**torch.load(path, weights_only=True), "train": {"epochs": 1}}, path)
    with pytest.raises(UserError, match="is finetuned"):
        search([*FLAGS, "--exp_name", "a", "--seed", "1", "--constraint", "2e5"])
    search([*FLAGS, "--exp_name", "a", "--seed", "1", "--constraint", "2e5", "--overwrite"])
    write_json(root / "exps/b/arch", [{}, {}])
    with pytest.raises(UserError, match="exists"):
        search([*FLAGS, "--exp_name", "b"])


def test_an_evolution_takes_the_place_of_it_whole(here):
    root, _ = here
    search([*FLAGS, "--exp_name", "a"])
    search(["--constraint", "0.05", "--generations", "2", "--population", "20", "--exp_name", "a", "--overwrite"])
    assert set(files_of(root / "exps/a")) == {"arch", "lat", "config.json", "history.jsonl"}
    assert not list((root / "exps/a").glob("front*"))


@pytest.mark.parametrize(
    "line", ['{"stage": "coarse"}', "[]", '{"stage": "coarse", "index": 9, "flops": 1, "top1": 1}']
)
def test_lines_of_another_search_are_refused(here, line):
    root, _ = here
    search([*FLAGS, "--exp_name", "a"])
    lines = (root / "exps/a/evaluated.jsonl").read_text().splitlines()
    (root / "exps/a/evaluated.jsonl").write_text("\n".join([*lines[:3], line, *lines[4:]]) + "\n")
    with pytest.raises(UserError, match="line 4: not a subnet of this search"):
        search([*FLAGS, "--exp_name", "a"])
    search([*FLAGS, "--exp_name", "a", "--overwrite"])  # measures again what is damaged
    assert sorted((root / "exps/a/evaluated.jsonl").read_text().splitlines()) == sorted(lines)
    (root / "exps/a/evaluated.jsonl").write_text("torn\n")
    search([*FLAGS, "--exp_name", "a", "--overwrite"])
    assert sorted((root / "exps/a/evaluated.jsonl").read_text().splitlines()) == sorted(lines)


def test_other_searches_leave_measurements_alone(here, monkeypatch):
    root, _ = here
    monkeypatch.setattr(command, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search([*FLAGS, "--exp_name", "a"])
    with pytest.raises(UserError, match="has measured subnets"):
        search(["--constraint", "0.05", "--generations", "2", "--population", "20", "--exp_name", "a"])
    assert (root / "exps/a/evaluated.jsonl").exists()


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([*FLAGS, "--constraint", "10"], "below the cheapest subnet of space digits"),
        ([*FLAGS, "--constraint", "nan"], "positive"),
        ([*FLAGS, "--n_coarse", "0"], "at least 1"),
        ([*FLAGS, "--flops_min", "5e5", "--flops_max", "1e5"], "must be below"),
        ([*FLAGS, "--flops_max", "1"], "must be below"),
        ([*FLAGS, "--flops_min", "1e9", "--flops_max", "2e9"], "no subnet of space digits"),
        ([*FLAGS, "--population", "5"], "--population belongs to --mode evolution"),
        ([*FLAGS, "--acc_predictor_dir", "nowhere"], "nowhere"),
        (["--constraint", "1", "--n_coarse", "5"], "--n_coarse belongs to --mode coarse_to_fine"),
        (["--mode", "ddpg", "--model", "mobilenet_v2_small", "--type", "flops"], "use bitops"),
        (["--mode", "sequential", "--constraint", "1", "--type", "flops"], "use bitops"),
    ],
)
def test_mistakes_get_one_clear_line(here, flags, match):
    root, calls = here
    with pytest.raises(UserError, match=match):
        search(flags)
    assert calls == []
    assert not (root / "exps").exists()


def test_measured_as_test_py_does_it(tmp_path, monkeypatch, capsys):
    """Without the made-up rule: the chosen weights have the accuracy that the search measured, and are reported."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    few = ["--n_coarse", "2", "--intervals", "1", "--n_fine", "1", "--recipe", "tiny", "--flops_min", "3e5"]
    search([*FLAGS, *few, "--exp_name", "a", "--json"])
    found = json.loads(capsys.readouterr().out)
    net, space, subnet, _ = load_finetuned(Experiment(tmp_path / "exps/a"))
    from dataset import load_splits
    from dataset.splits import make_loader
    from elastic_nn.training.engine import evaluate

    val = make_loader(load_splits(space).val, 256, sides=(subnet.resolution,))
    assert evaluate(net, val, torch.device("cpu")).top1 == found["top1"] > 0.5
    report(["--exp_dir", "exps/a", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["costs"] == found["costs"]
    full = shown["costs"]["full"]
    assert full["weighted_flops"] == full["bitops"] / 64
    report(["--exp_dir", "exps/a"])
    assert f"{full['weighted_flops'] / 1e6:.3f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        quant_aware(["--exp_name", "a"])
