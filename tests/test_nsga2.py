from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from example_spaces import ALL, TINY, every_row
from hypothesis import given, settings
from hypothesis import strategies as st
from pymoo.indicators.hv import HV
from test_evolution import worth

from apq.errors import UserError
from apq.genes import canonical, forbidden_slots, sample
from apq.presets import APQ_IMAGENET, DIGITS
from apq.resume import Resume
from methods.nsga2 import front_finder
from methods.nsga2.front_finder import Nsga2Config, Objective, find_front, first_population, losses_of
from methods.nsga2.picking import Bound, parse_bounds, pick
from methods.nsga2.sorting import survivors, tournament
from methods.search.operators import crossover
from utils.latency_predictor import LatencyPredictor

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)
SHORT = Nsga2Config(population=40, generations=30)
ALL_COSTS = ("bitops", "size", "latency")


def objectives_of(space, costs=("bitops",), accuracy=None):
    found = [Objective(name="accuracy", score=accuracy or worth(space), maximise=True)]
    for name in costs:
        cost = LatencyPredictor(type=name, scope="full", space=space)
        found.append(Objective(name=name, score=cost.predict, unit=cost.unit, cheapest=cost.cheapest_genes()))
    return found


def beats(one, other):
    return (one <= other).all() and (one < other).any()


def peeled(losses):
    """Ranks by definition: remove the points that no other dominates, again and again."""
    ranks, left, rank = np.full(len(losses), -1), list(range(len(losses))), 0
    while left:
        front = [i for i in left if not any(beats(losses[j], losses[i]) for j in left)]
        ranks[front] = rank
        left = [i for i in left if ranks[i] < 0]
        rank += 1
    return ranks


def room(front):
    """Crowding distance as in Deb et al., as a mean over objectives. Ties keep the order of their rows."""
    if len(front) <= 2:
        return np.full(len(front), np.inf)
    distance = np.zeros(len(front))
    for column in front.T:
        order = sorted(range(len(front)), key=lambda i: column[i])
        if column[order[0]] == column[order[-1]]:
            continue
        distance[[order[0], order[-1]]] = np.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distance[i] += (column[after] - column[before]) / (column[order[-1]] - column[order[0]])
    return distance / front.shape[1]


# Sorting

few_points = st.tuples(st.integers(1, 24), st.integers(2, 4), st.integers(2, 12), st.integers(0, 2**32 - 1))


@given(few_points, st.integers(1, 30))
@settings(max_examples=200)
def test_survivors_are_those_of_the_definition(points, n):
    size, columns, n_values, seed = points
    losses = np.random.default_rng(seed).integers(n_values, size=(size, columns)).astype(float)  # with ties
    kept, ranks, crowding = survivors(losses, n)
    expected = peeled(losses)
    assert len(set(kept.tolist())) == len(kept) == min(n, size)
    assert np.array_equal(ranks, expected[kept])
    assert np.array_equal(ranks, np.sort(expected)[: len(kept)])
    for rank in range(ranks[-1] + 1):
        front = np.flatnonzero(expected == rank)
        distance = room(losses[front])
        of_kept = dict(zip(front.tolist(), distance, strict=True))
        assert crowding[ranks == rank] == pytest.approx([of_kept[i] for i in kept[ranks == rank].tolist()])
        if rank == ranks[-1]:  # the front that was cut lost those with the least room
            lost = sorted(set(front.tolist()) - set(kept.tolist()))
            assert all(of_kept[i] <= crowding[ranks == rank].min() + 1e-12 for i in lost)
        else:
            assert set(front.tolist()) <= set(kept.tolist())


def test_the_fitter_wins_a_tournament():
    ranks, crowding = np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 5.0, np.inf])
    wins = np.bincount(tournament(ranks, crowding, 40_000, np.random.default_rng(0)), minlength=4) / 40_000
    # i wins the pairs in which it meets itself or a worse one: 1 beats all, then 0, then 3, then 2.
    assert wins == pytest.approx([5 / 16, 7 / 16, 1 / 16, 3 / 16], abs=0.01)


def test_crossover_by_share():
    rng = np.random.default_rng(0)
    mothers, fathers = sample(DIGITS, 300, rng), sample(DIGITS, 300, rng)
    assert np.array_equal(crossover(DIGITS, mothers, fathers, rng, 0.0), mothers)
    assert np.array_equal(crossover(DIGITS, mothers, fathers, rng, 1.0), fathers)
    differ = mothers[:, -4:-1] != fathers[:, -4:-1]  # depths, to which nothing else happens
    from_father = crossover(DIGITS, mothers, fathers, rng, 0.2)[:, -4:-1] == fathers[:, -4:-1]
    assert from_father[differ].mean() == pytest.approx(0.2, abs=0.05)


# Search


@pytest.mark.parametrize("costs", [("bitops",), ("size", "latency")], ids=lambda c: "-".join(c))
def test_finds_the_front_of_a_tiny_space(costs):
    objectives, rows = objectives_of(TINY, costs), every_row(TINY)
    losses = losses_of(objectives, front_finder.scores(objectives, rows))
    beaten = [((losses <= one).all(axis=1) & (losses < one).any(axis=1)).any() for one in losses]
    expected = np.unique(losses[~np.array(beaten)], axis=0)
    found = find_front(TINY, objectives, Nsga2Config(population=120, generations=60, mutation_prob=0.1))
    assert np.array_equal(np.unique(losses_of(objectives, found.values), axis=0), expected)


@spaces
@given(seed=st.integers(0, 2**32 - 1), n_costs=st.integers(1, 3))
@settings(max_examples=5)
def test_a_front_is_a_front(space, seed, n_costs):
    objectives, scored = objectives_of(space, ALL_COSTS[:n_costs]), []
    score = objectives[0].score
    objectives[0] = dataclasses.replace(objectives[0], score=lambda genes: (scored.append(genes), score(genes))[1])
    config = Nsga2Config(population=30, generations=6, seed=seed)
    found = find_front(space, objectives, config)
    values, losses = found.values, losses_of(objectives, found.values)
    assert 1 <= len(values) <= 30
    assert not any(beats(a, b) for a in losses for b in losses)
    assert len(np.unique(losses, axis=0)) == len(losses)
    assert (np.diff(values[:, 1]) >= 0).all()
    assert np.array_equal(values, front_finder.scores(objectives, found.genes))
    assert not forbidden_slots(space, found.genes).any()
    assert np.array_equal(found.genes, canonical(space, found.genes))
    rows = np.concatenate(scored[:-1])  # the last are the front, scored again by the line above
    assert len(rows) == found.history[-1]["evaluated"]
    if n_costs == 1:  # no candidate beats the front, unless a generation had more of them than it could keep
        met = losses_of(objectives, np.stack([score(rows), objectives[1].score(rows)], axis=1))
        if all(record["front"] < 30 for record in found.history):
            assert not any(beats(a, b) for a in met[peeled_first(met)] for b in losses)
    assert values[0, 1] == pytest.approx(objectives[1].score(canonical(space, objectives[1].cheapest[None]))[0])


def peeled_first(losses):
    """Indices of the points that no other dominates, for two objectives."""
    order = np.lexsort((losses[:, 1], losses[:, 0]))
    best = np.minimum.accumulate(losses[order, 1])
    return order[np.concatenate([[True], losses[order[1:], 1] < best[:-1]])]


@pytest.mark.parametrize("space", [DIGITS, APQ_IMAGENET], ids=lambda s: s.name)
@pytest.mark.parametrize("costs", [("bitops",), ("latency", "size")], ids=lambda c: "-".join(c))
def test_clearly_beats_random_search(space, costs):
    objectives = objectives_of(space, costs)
    found = find_front(space, objectives, SHORT)
    rng = np.random.default_rng(0)
    n = found.history[-1]["evaluated"]
    uniform = front_finder.scores(objectives, sample(space, n, rng))
    spread = front_finder.scores(objectives, first_population(space, objectives, n, rng))
    losses = [losses_of(objectives, values) for values in (uniform, spread, found.values)]
    low, high = np.concatenate(losses).min(axis=0), np.concatenate(losses).max(axis=0)
    of_uniform, of_spread, of_found = (HV(ref_point=np.ones(len(low)))((part - low) / (high - low)) for part in losses)
    assert of_found > 1.05 * max(of_uniform, of_spread)


@spaces
def test_a_first_population_reaches_the_cheap_ends(space):
    objectives = objectives_of(space, ALL_COSTS)
    rows = first_population(space, objectives, 60, np.random.default_rng(0))
    assert len(np.unique(rows, axis=0)) == len(rows) == 60
    for one in objectives[1:]:
        assert one.score(rows).min() == pytest.approx(one.score(canonical(space, one.cheapest[None]))[0])


def test_a_front_goes_on_from_another():
    """Up to half of the first population are of the start, spread over all of it; the cheap ends are still reached."""
    objectives = objectives_of(DIGITS, ALL_COSTS)
    first = find_front(DIGITS, objectives, SHORT)
    rows = first_population(DIGITS, objectives, 12, np.random.default_rng(0), first.genes)
    assert len(np.unique(rows, axis=0)) == len(rows) == 12
    spread = first.genes[[round(i * (len(first.genes) - 1) / 5) for i in range(6)]]
    assert np.array_equal(rows[:6], spread)
    for one in objectives[1:]:
        assert one.score(rows).min() == pytest.approx(one.score(canonical(DIGITS, one.cheapest[None]))[0])
    on = find_front(DIGITS, objectives, SHORT, start=first.genes)
    assert on.history[0]["front"] >= 1
    assert on.history[-1]["best_accuracy"] >= on.history[0]["best_accuracy"]
    few = first_population(DIGITS, objectives, 12, np.random.default_rng(0), first.genes[:2])
    assert np.array_equal(few[:2], first.genes[:2])
    assert len(few) == 12


def test_same_seed_same_front():
    objectives = objectives_of(DIGITS)
    first, again = find_front(DIGITS, objectives, SHORT), find_front(DIGITS, objectives, SHORT)
    assert np.array_equal(first.genes, again.genes)
    assert first.history == again.history
    other = find_front(DIGITS, objectives, dataclasses.replace(SHORT, seed=1))
    assert first.history != other.history


def test_history_tells_the_search():
    seen = []
    found = find_front(DIGITS, objectives_of(DIGITS), SHORT, seen.append)
    assert found.history == seen == json.loads(json.dumps(seen))
    assert [record["generation"] for record in seen] == list(range(31))
    assert [record["evaluated"] for record in seen] == [40 * (i + 1) for i in range(31)]
    best = [record["best_accuracy"] for record in seen]
    assert best == sorted(best)
    assert best[-1] == found.values[:, 0].max()
    assert seen[-1]["best_bitops"] == found.values[0, 1]


def test_a_space_of_which_all_is_known_ends_the_search():
    found = find_front(TINY, objectives_of(TINY), Nsga2Config(population=5000, generations=500, mutation_prob=0.2))
    assert found.history[-1]["evaluated"] == len(every_row(TINY))
    assert len(found.history) < 500


# A killed run


class KilledError(Exception):
    pass


def killed_at(score, call):
    """A score that kills the run at its `call`-th batch."""
    calls = []

    def scored(genes):
        calls.append(len(genes))
        if len(calls) == call:
            raise KilledError
        return score(genes)

    return scored


@pytest.mark.parametrize("kills", [(3,), (7, 11), (30,)])
@pytest.mark.parametrize("costs", [("bitops",), ("latency", "energy", "size")], ids=len)
def test_a_killed_run_finds_the_same_front(tmp_path, monkeypatch, kills, costs):
    objectives, resume = objectives_of(DIGITS, costs), Resume(tmp_path / "front.state.pt", {"a": costs[0]}, "search")
    whole = find_front(DIGITS, objectives, SHORT)
    done = 0
    for kill in kills:
        dying = [dataclasses.replace(objectives[0], score=killed_at(objectives[0].score, kill)), *objectives[1:]]
        with pytest.raises(KilledError):
            find_front(DIGITS, dying, SHORT, resume=resume)
        done += kill - 1
        assert resume.load()["history"] == whole.history[:done]
    rest = []
    found = find_front(DIGITS, objectives, SHORT, rest.append, resume)
    assert rest == whole.history[done:] != []
    assert np.array_equal(found.genes, whole.genes)
    assert np.array_equal(found.values, whole.values)
    assert found.history == whole.history


def test_another_search_does_not_continue(tmp_path):
    file, objectives = tmp_path / "front.state.pt", objectives_of(DIGITS)
    find_front(DIGITS, objectives, SHORT, resume=Resume(file, {"seed": 0, "kind": "one"}, "search"))
    others = (({"seed": 1, "kind": "one"}, "seed was 0, is 1"), ({"seed": 0}, "kind was given"), ({}, "seed was given"))
    for asked, match in others:
        with pytest.raises(UserError, match=match):
            find_front(DIGITS, objectives, SHORT, resume=Resume(file, asked, "search"))
    for damage in (b"", file.read_bytes()[:-300], b"no archive"):
        file.write_bytes(damage)
        with pytest.raises(UserError, match="--overwrite"):
            find_front(DIGITS, objectives, SHORT, resume=Resume(file, {"seed": 0}, "search"))


# Mistakes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_scores_that_are_not_finite_are_an_error(bad, which):
    objectives = objectives_of(DIGITS)
    name = objectives[which].name
    objectives[which] = dataclasses.replace(objectives[which], score=lambda genes: np.full(len(genes), bad))
    with pytest.raises(UserError, match=f"{name} of some subnets is not"):
        find_front(DIGITS, objectives, SHORT)


@pytest.mark.parametrize("n", [1, 5])
def test_a_front_has_two_to_four_objectives(n):
    with pytest.raises(UserError, match="2 to 4"):
        find_front(DIGITS, objectives_of(DIGITS, ("bitops", "size", "latency", "energy"))[:n], SHORT)


@pytest.mark.parametrize(
    "setting",
    [
        {"population": 1},
        {"generations": -1},
        {"crossover_prob": 1.1},
        {"crossover_prob": float("nan")},
        {"mutation_prob": 0.0},
    ],
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UserError):
        Nsga2Config(**setting)


# Picking


def test_bounds_are_read():
    assert parse_bounds(None, ("latency",)) == ()
    assert parse_bounds("latency<=8.4", ("latency",)) == (Bound("latency", 8.4),)
    both = parse_bounds(" size < 9e3 ,latency<=.5", ("latency", "size"))
    assert both == (Bound("size", 9000.0, strict=True), Bound("latency", 0.5))
    assert parse_bounds(",".join(map(str, both)), ("latency", "size")) == both


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not COST<=NUMBER"),
        ("latency", "not COST<=NUMBER"),
        ("latency>=3", "not COST<=NUMBER"),
        ("latency=3", "not COST<=NUMBER"),
        ("latency<=3,", "not COST<=NUMBER"),
        ("latency<==3", "not a number"),
        ("latency<=fast", "'fast' is not a number"),
        ("latency<nan", "'nan' is not a number"),
        ("latency<=inf", "not a number"),
        ("energy<=3", "'energy' is not a cost of this front; known: latency, size"),
        ("accuracy<=3", "'accuracy' is not a cost"),
        ("latency<=3,speed<1", "'speed' is not a cost"),
    ],
)
def test_bounds_that_say_nothing_are_refused(text, match):
    with pytest.raises(UserError, match=match):
        parse_bounds(text, ("latency", "size"))


def test_the_most_accurate_point_within_the_bounds():
    accuracy, costs = (
        np.array([0.1, 0.5, 0.4, 0.5]),
        {"latency": np.array([1.0, 2, 3, 4]), "size": np.array([9.0, 8, 2, 1])},
    )
    for text, expected in ((None, 1), ("latency<=4", 1), ("latency<2", 0), ("latency<=2", 1), ("size<8", 3)):
        assert pick(parse_bounds(text, ("latency", "size")), accuracy, costs) == expected
    assert pick(parse_bounds("latency<=3,size<=2", ("latency", "size")), accuracy, costs) == 2
    with pytest.raises(UserError, match=r"no point of the front has latency<1; the cheapest: latency 1$"):
        pick(parse_bounds("latency<1", ("latency",)), accuracy, costs)
    with pytest.raises(UserError, match=r"latency<=2 and size<=2; each bound is met by some, but not all together$"):
        pick(parse_bounds("latency<=2,size<=2", ("latency", "size")), accuracy, costs)
