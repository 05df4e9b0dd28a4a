from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from example_spaces import ALL, TINY, every_row
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from apq.genes import CHUNK, canonical, cardinalities, forbidden_slots, genes_of, sample, view
from apq.presets import APQ_IMAGENET, DIGITS
from methods import MODES
from methods.evolution.evolution_finder import EVOLUTIONS, EvolutionConfig, EvolutionFinder
from methods.search.budget import Budget, Seen, fill, newcomers
from methods.search.flags import evolution_config
from methods.search.operators import blend, crossover, mutate
from report.plots import plot_history
from utils.latency_predictor import LatencyPredictor

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)
seeds = given(seed=st.integers(0, 2**32 - 1))
SHORT = EvolutionConfig(population=40, generations=30)


def worth(space, seed=0):
    """A synthetic accuracy: every choice has a value, neighbouring genes interact, larger tends to be better."""
    rng, counts = np.random.default_rng(seed), cardinalities(space)
    table = np.sort(rng.uniform(0, 1, (len(counts), counts.max())), axis=1)

    def accuracy(genes):
        values = table[np.arange(len(counts)), genes]
        return 0.5 + 0.4 * np.tanh(values.mean(axis=1) + (values[:, 1:] * values[:, :-1]).mean(axis=1) - 0.5)

    return accuracy


def finder(space, limit, config=SHORT, quantity="bitops", accuracy=None):
    cost = LatencyPredictor(type=quantity, scope=space.budget_scope, space=space)
    lowest = cost.cheapest()[0]
    constraint = lowest * limit
    return EvolutionFinder(
        space, accuracy or worth(space), cost.predict, constraint, config, cost.cheapest_genes(), cost.unit
    )


# Operators


@spaces
@seeds
@settings(max_examples=20)
def test_operators_keep_rows_legal_and_canonical(space, seed):
    rng = np.random.default_rng(seed)
    mothers, fathers = sample(space, 20, rng), sample(space, 20, rng)
    before = mothers.copy()
    for children in (
        mutate(space, mothers, np.full(20, 0.3), rng),
        crossover(space, mothers, fathers, rng),
        blend(space, mothers, fathers[0], rng.random(20), rng),
    ):
        assert children.shape == mothers.shape
        assert (children >= 0).all()
        assert (children < cardinalities(space)).all()
        assert not forbidden_slots(space, children).any()
        assert np.array_equal(children, canonical(space, children))
    assert np.array_equal(mothers, before)


@spaces
def test_every_gene_mutates_both_ways(space):
    rng = np.random.default_rng(0)
    counts = cardinalities(space)
    for start, grows in ((np.zeros_like(counts), True), (counts - 1, False)):
        start = canonical(space, start[None])
        parents = np.repeat(start, 4000, axis=0)
        children = mutate(space, parents, np.full(len(parents), 0.3), rng)
        moved = (children > start).any(axis=0) if grows else (children < start).any(axis=0)
        at_end = start[0] == (counts - 1 if grows else 0)  # idle slots start at their defaults
        assert (moved | at_end).all()
        assert moved[view(space, np.arange(len(counts))[None]).d[0]][[len(s.depths) > 1 for s in space.stages]].all()


@spaces
def test_crossover_takes_every_gene_from_either_parent(space):
    rng = np.random.default_rng(0)
    mother, father = sample(space, 2, rng)
    n = 400
    for a, b in ((mother, father), (father, mother)):
        children = crossover(space, np.tile(a, (n, 1)), np.tile(b, (n, 1)), rng)
        for from_one in (a, b):
            depths = view(space, (children == from_one)[:, :]).d
            assert depths.any(axis=0).all()
        slots = 0  # the first slot always runs: its genes must be from a parent and meet both
        for part in ("ks", "e"):
            seen = set(getattr(view(space, children), part)[:, slots])
            parents = {int(getattr(view(space, p[None]), part)[0, slots]) for p in (a, b)}
            assert parents <= seen


@pytest.mark.parametrize("probability", [0.0, 1 / 512, 0.02, 0.3, 0.5, 1 - 1 / 300, 1.0])
def test_genes_move_with_the_probability_of_their_row(probability):
    """Towards a target that differs in every gene. Within five standard deviations of a binomial count."""
    counts, rng = cardinalities(TINY), np.random.default_rng(0)
    full = canonical(TINY, (counts - 1)[None])  # the deepest: nothing is idle in either half of the test
    n = 20_000
    strength = np.where(np.arange(n) % 2, probability, 0.0)
    moved = blend(TINY, np.repeat(full, n, axis=0), np.zeros_like(counts), strength, rng)
    column = view(TINY, np.arange(len(counts))[None]).resolution[0]  # no rule, no depth changes it
    hits, deviation = (moved[:, column] == 0)[1::2].sum(), np.sqrt(n / 2 * probability * (1 - probability))
    assert (moved[::2] == full).all()
    assert abs(hits - n / 2 * probability) <= 5 * deviation


def test_no_mutation_and_full_blend():
    rng = np.random.default_rng(0)
    genes = sample(DIGITS, 10, rng)
    assert np.array_equal(mutate(DIGITS, genes, np.zeros(10), rng), genes)
    assert np.array_equal(blend(DIGITS, genes, genes[3], np.ones(10), rng), np.tile(genes[3], (10, 1)))
    assert np.array_equal(blend(DIGITS, genes, genes[3], np.zeros(10), rng), genes)


# Budget


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_constraint_is_a_positive_number(limit):
    with pytest.raises(UserError, match="positive number"):
        finder(TINY, 1.0).__class__(TINY, worth(TINY), lambda genes: genes.sum(axis=1), limit)


@spaces
@pytest.mark.parametrize("factor", [1.0, 1.05, 1.5, 100.0])
def test_any_budget_that_can_be_met_is_filled(space, factor):
    cost = LatencyPredictor(type="bitops", scope="full", space=space)
    budget = Budget(cost=cost.predict, limit=cost.cheapest()[0] * factor)
    propose = newcomers(space, np.random.default_rng(0), cost.cheapest_genes())
    genes, costs, _ = fill(50, propose, budget, Seen.empty(space), max_rounds=20)
    assert 1 <= len(genes) <= 50
    assert len(genes) == 50 or factor < 1.5 or space is TINY
    assert len(np.unique(genes, axis=0)) == len(genes)
    assert (costs <= budget.limit).all()
    assert np.array_equal(costs, cost.predict(genes))


def test_tight_latency_budgets_on_apq_imagenet_are_filled():
    cost = LatencyPredictor()
    lowest = cost.cheapest()[0]
    for limit in (12.8, 8.0, 1.1 * lowest):
        propose = newcomers(APQ_IMAGENET, np.random.default_rng(0), cost.cheapest_genes())
        budget = Budget(cost=cost.predict, limit=limit)
        assert len(fill(100, propose, budget, Seen.empty(APQ_IMAGENET), max_rounds=20)[0]) == 100


@seeds
@settings(max_examples=20)
def test_seen_knows_rows(seed):
    genes = sample(DIGITS, 60, np.random.default_rng(seed))
    seen = Seen.empty(DIGITS)
    keys = seen.key(genes)
    assert np.array_equal(seen.key(genes.astype(np.int16)), keys)
    assert len(np.unique(keys)) == len(np.unique(genes, axis=0))
    twice = np.concatenate([keys, keys])
    assert sorted(seen.new(twice)) == sorted(np.unique(keys, return_index=True)[1])
    seen = seen.with_keys(keys[:30]).with_keys(keys[30:45])
    assert set(keys[seen.new(keys)]) == set(keys[45:]) - set(keys[:45])
    assert seen.keys.tolist() == sorted(keys[:45])


@seeds
@settings(max_examples=20)
def test_seen_is_a_set(seed):
    rng, known, seen = np.random.default_rng(seed), set(), Seen.empty(TINY)
    for size in rng.integers(0, 300, size=20):
        keys = rng.integers(-2000, 2000, size=size)
        new = seen.new(keys)
        assert keys[new].tolist() == [k for i, k in enumerate(keys) if k not in known and k not in keys[:i]]
        seen, known = seen.with_keys(keys[new]), known | {*keys.tolist()}
    assert seen.keys.tolist() == sorted(known)


def test_seen_has_few_runs_however_often_some_are_added():
    """Each is searched for every key: their number grows with the logarithm of all."""
    seen = Seen.empty(TINY)
    for i in range(3000):
        seen = seen.with_keys(np.arange(10 * i, 10 * i + 10))
    assert len(seen.keys) == 30_000
    assert len(seen.runs) <= 4


def test_proposals_are_made_in_chunks_until_there_are_enough():
    rng, asked = np.random.default_rng(0), []

    def propose(size, number):
        asked.append((size, number))
        return sample(APQ_IMAGENET, size, rng)

    n = 3 * CHUNK
    budget = Budget(cost=lambda genes: np.ones(len(genes)), limit=1.0)
    genes, costs, seen = fill(n, propose, budget, Seen.empty(APQ_IMAGENET), max_rounds=1)
    assert asked == [(CHUNK, 0)] * 3  # of a round of 4.5
    assert len(genes) == len(costs) == len(seen.keys) == len(np.unique(genes, axis=0)) == n


# Search


def test_finds_the_optimum_of_a_tiny_space():
    rows = every_row(TINY)
    for limit in (1.0, 1.3, 2.0, 50.0):
        search = finder(TINY, limit, EvolutionConfig(population=60, generations=60))
        found = search.run()
        allowed = rows[search.budget.cost(rows) <= search.budget.limit]
        assert found.accuracy == pytest.approx(search.accuracy(allowed).max())
        assert found.cost <= search.budget.limit


@pytest.mark.parametrize("space", [DIGITS, APQ_IMAGENET], ids=lambda s: s.name)
@pytest.mark.parametrize("limit", [1.3, 2.0])
def test_clearly_beats_random_search(space, limit):
    search = finder(space, limit)
    found = search.run()
    n = found.history[-1]["evaluated"]
    propose = newcomers(space, np.random.default_rng(0), search.cheapest)
    genes, _, _ = fill(n, propose, search.budget, Seen.empty(space), max_rounds=20)
    scores = search.accuracy(genes)
    assert found.accuracy > scores.max() + scores.std()


@spaces
@pytest.mark.parametrize("quantity", ["latency", "size"])
def test_never_over_budget_and_never_twice(space, quantity):
    scored = []
    score = worth(space)

    def accuracy(genes):
        scored.append(genes)
        return score(genes)

    search = finder(space, 1.2, dataclasses.replace(SHORT, generations=8), quantity, accuracy)
    found = search.run()
    rows = np.concatenate(scored)
    assert len(np.unique(rows, axis=0)) == len(rows) == found.history[-1]["evaluated"]
    assert (search.budget.cost(rows) <= search.budget.limit).all()
    assert not forbidden_slots(space, rows).any()
    assert found.accuracy == score(rows).max()
    best = genes_of(space, [found.subnet])
    assert score(best)[0] == found.accuracy
    assert search.budget.cost(best)[0] == found.cost <= search.budget.limit


def test_history_tells_the_search():
    seen = []
    found = finder(DIGITS, 2.0).run(seen.append)
    assert found.history == seen == json.loads(json.dumps(seen))
    assert [record["generation"] for record in seen] == list(range(31))
    best = [record["best_accuracy"] for record in seen]
    assert best == sorted(best)
    assert best[-1] == found.accuracy
    assert seen[-1]["best_cost"] == found.cost
    assert all(record["mean_accuracy"] <= record["best_accuracy"] for record in seen)
    assert [record["evaluated"] for record in seen] == [40 * (i + 1) for i in range(31)]


def test_same_seed_same_search():
    first, again = finder(DIGITS, 1.5).run(), finder(DIGITS, 1.5).run()
    assert first == again
    assert (first.genes == again.genes).all()
    other = finder(DIGITS, 1.5, dataclasses.replace(SHORT, seed=1)).run()
    assert other.history != first.history


def test_a_run_leaves_the_finder_as_it_was():
    search = finder(DIGITS, 1.5)
    assert search.run() == search.run()


@pytest.mark.parametrize("mutation_ratio", [0.0, 1.0])
def test_mutants_alone_and_crossovers_alone_search_too(mutation_ratio):
    found = finder(DIGITS, 2.0, dataclasses.replace(SHORT, mutation_ratio=mutation_ratio)).run()
    assert found.accuracy > found.history[0]["best_accuracy"]


def test_patience_ends_a_search():
    config = dataclasses.replace(SHORT, patience=3, generations=500)
    found = finder(DIGITS, 1.2, config, accuracy=lambda genes: np.full(len(genes), 0.5)).run()
    assert len(found.history) == 4


def test_zero_generations_are_a_random_draw():
    found = finder(DIGITS, 2.0, dataclasses.replace(SHORT, generations=0)).run()
    assert len(found.history) == 1


def test_a_budget_below_the_cheapest_names_it():
    cost = LatencyPredictor(type="latency", scope="published", space=APQ_IMAGENET)
    lowest = cost.cheapest()[0]
    with pytest.raises(UserError, match=rf"cheapest subnet.*{lowest:.6g} ms"):
        EvolutionFinder(
            APQ_IMAGENET, worth(APQ_IMAGENET), cost.predict, 0.99 * lowest, None, cost.cheapest_genes(), cost.unit
        )


def test_without_a_cheapest_row_a_hopeless_budget_still_ends():
    cost = LatencyPredictor(type="latency", scope="published", space=APQ_IMAGENET)
    search = EvolutionFinder(APQ_IMAGENET, worth(APQ_IMAGENET), cost.predict, 0.1, SHORT, unit="ms")
    with pytest.raises(UserError, match=r"within 0\.1 ms"):
        search.run()


def test_nan_accuracies_are_an_error():
    with pytest.raises(UserError, match="NaN"):
        finder(DIGITS, 2.0, accuracy=lambda genes: np.full(len(genes), np.nan)).run()


@pytest.mark.parametrize(
    "setting",
    [{"population": 1}, {"generations": -1}, {"parent_ratio": 0.0}, {"mutation_prob": 1.1}, {"patience": 0}],
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UserError):
        EvolutionConfig(**setting)


def settings_of(flags, name="evolution"):
    return evolution_config(MODES[name].load().build_parser().parse_args(["--constraint", "1", *flags]))


@pytest.mark.parametrize("mode", ["evolution", "sequential"])
def test_published_settings_have_one_name(mode):
    """APQ's evolution_finder.py: population 100, a quarter are parents, 50 mutants, 50 crossovers, mutation 0.1;
    evo_main_gather.py: 500 generations."""
    expected = EvolutionConfig(
        population=100, generations=500, parent_ratio=25 / 100, mutation_prob=0.1, mutation_ratio=50 / (50 + 50)
    )
    assert settings_of(["--evolution", "published"], mode) == expected
    changed = settings_of(["--mutation_prob", "0.3", "--evolution", "published", "--seed", "3"], mode)
    assert changed == dataclasses.replace(expected, mutation_prob=0.3, seed=3)
    assert settings_of([], mode) == settings_of(["--evolution", "default"], mode) == EvolutionConfig()
    assert settings_of(["--population", "7"], mode) == EvolutionConfig(population=7)
    candidates = {config.population * config.generations for config in EVOLUTIONS.values()}
    assert candidates == {50_000}  # both searches cost the same


def test_the_history_is_drawn(tmp_path):
    found = finder(TINY, 2.0, dataclasses.replace(SHORT, generations=3)).run()
    for records in (found.history, found.history[:1]):
        plot_history(records, tmp_path / "history.png", constraint=5.0, quantity="latency", unit="ms", title="tiny")
        assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["history.png"]


def test_a_search_goes_on_from_the_best_of_another():
    """Half of the first generation are of the start, as far as they are within the budget; the rest is drawn."""
    search, scored, half = finder(DIGITS, 1.5), [], SHORT.population // 2
    first, cost, limit = search.run(), search.budget.cost, search.budget.limit

    def accuracy(genes):
        scored.append(genes.copy())
        return worth(DIGITS)(genes)

    on = EvolutionFinder(DIGITS, accuracy, cost, limit, SHORT, start=first.genes).run()
    assert np.array_equal(scored[0][:half], first.genes[:half])
    assert len(np.unique(scored[0], axis=0)) == SHORT.population
    assert on.accuracy >= on.history[0]["best_accuracy"] == first.accuracy
    tight = float(np.median(cost(first.genes[:half])))
    EvolutionFinder(DIGITS, accuracy, cost, tight, SHORT, start=first.genes).run()
    kept = [row for row in first.genes[:half] if cost(row[None])[0] <= tight]
    assert kept
    assert np.array_equal(scored[len(on.history)][: len(kept)], kept)
