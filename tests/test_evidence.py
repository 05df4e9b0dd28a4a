"""benchmarks/evidence.py: paired tests against hand calculations, its runs on a tiny setting, and after a kill."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from example_spaces import TINY
from scipy import stats

from apq.errors import UserError
from apq.files import read_jsonl
from apq.genes import genes_of, largest_subnet
from apq.layers import layers_of
from apq.policy import LINEAR
from apq.presets import FASHION
from benchmarks import evidence, evidence_oqa, evidence_qfa, evidence_tables
from benchmarks.bit_methods import dominated_rows
from benchmarks.evidence_ground import NoResult, SearchCost
from benchmarks.evidence_joint import at_uniform_bits, in_space
from benchmarks.evidence_lines import FILE, Line, Run, budgets_of_lines, read_lines
from benchmarks.evidence_pairs import left_out
from benchmarks.evidence_setting import FASHION_SETTING, QUANTITIES, TINY_SETTING, budgets_of, middle_subnet
from benchmarks.evidence_statistics import least_difference, paired

ONE_SEED = ["--tiny", "--seeds", "7", "--device", "cpu"]
LEFT, RIGHT = [90.1, 89.9, 90.5, 90.2, 90.3], [89.5, 89.9, 89.7, 89.8, 89.6]


def test_paired_t_by_hand():
    """Differences 0.6, 0, 0.8, 0.4, 0.7: mean 0.5, sum of squared deviations 0.4, t = 0.5 / (sqrt(0.1) / sqrt(5))."""
    found = paired(LEFT, RIGHT)
    assert (found.n, found.mean) == (5, pytest.approx(0.5))
    assert found.std == pytest.approx(math.sqrt(0.1))
    t = 0.5 / math.sqrt(0.1 / 5)  # 3.5355
    assert t == pytest.approx(3.5355, abs=1e-4)
    # Two tails of Student's t with 4 degrees of freedom, whose distribution has a closed form.
    x = t / math.sqrt(4 + t * t)
    tail = 0.5 - 0.75 * (x - x**3 / 3)
    assert found.t_test == pytest.approx(2 * tail)


def test_wilcoxon_by_counting_signs():
    """Of the 32 signs of ranks 1 to 5, the share with a sum of positive ranks at least as far from 7.5."""
    found = paired([1.0, 2.0, 3.0, 4.0, -0.5], [0.0] * 5)  # ranks 2, 3, 4, 5 positive, 1 negative
    sums = [sum(rank for rank, sign in enumerate(signs, 1) if sign) for signs in itertools.product((0, 1), repeat=5)]
    assert found.wilcoxon == pytest.approx(np.mean([abs(w - 7.5) >= 14 - 7.5 for w in sums]))
    assert paired([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5).wilcoxon == pytest.approx(2 / 32)  # the least of five seeds


def test_no_test_of_equal_differences():
    assert paired([0.3, 0.2], [0.2, 0.1]).t_test is None
    assert paired([0.3, 0.2], [0.2, 0.1]).least is None
    assert paired([0.5, 0.5], [0.5, 0.5]).wilcoxon is None
    assert paired([0.7], [0.5]).wilcoxon is None
    with pytest.raises(ValueError, match="two equal numbers"):
        paired([1.0, 2.0], [1.0])


def test_least_difference_is_found_in_four_of_five_cases():
    """Drawn samples with that true mean: p < 0.05 in 80 % of them."""
    rng, n, std = np.random.default_rng(0), 5, 0.4
    true = least_difference(std, n)
    drawn = true + std * rng.standard_normal((40_000, n))
    share = np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05)
    assert share == pytest.approx(0.8, abs=0.01)
    assert least_difference(2 * std, n) == pytest.approx(2 * true)
    # Many pairs: the normal distribution, (1.95996 + 0.84162) std / sqrt(n).
    assert least_difference(1.0, 10_000) == pytest.approx(2.80158 / 100, rel=1e-3)


def test_dominated_rows_by_brute_force():
    pairs = np.random.default_rng(0).integers(2, 9, size=(30, 2))
    pairs = np.unique(pairs, axis=0)
    expected = [any((a <= b).all() and (a != b).any() for b in pairs) for a in pairs]
    assert dominated_rows(pairs).tolist() == expected


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_budgets_bind(quantity):
    """They rise evenly in the logarithm, bits can meet the tightest, 8 bits everywhere meet the loosest alone."""
    limits = budgets_of(FASHION_SETTING, quantity)
    steps = np.diff(np.log(limits))
    assert len(limits) == 4
    assert steps == pytest.approx(np.full(3, steps.mean()), rel=0.01)
    assert steps.min() > 0.1  # 10 % apart


def test_the_middle_of_fashion():
    subnet = middle_subnet(FASHION)
    assert (set(subnet.ks[:2]), subnet.d) == ({5}, (2, 2, 2))
    assert {layer.w_bits for layer in layers_of(FASHION, subnet)} == {8}


def test_uniform_bits():
    """Every searched layer has these bits, in the whole space too, and idle slots are canonical there."""
    space = replace(TINY, forbidden=())
    uniform = at_uniform_bits(space, 4, 8)
    subnet = in_space(space, uniform, largest_subnet(uniform))
    searched = [layer for layer in layers_of(space, subnet) if layer.name.startswith(("blocks.1", "blocks.2"))]
    assert {(layer.w_bits, layer.a_bits) for layer in searched} == {(4, 8)}
    assert (genes_of(space, [subnet]) >= 0).all()


def test_search_costs_add_up():
    assert SearchCost(measured=1, trained_images=2) + SearchCost(measured=3, scored_images=4) == SearchCost(
        measured=4, trained_images=2, scored_images=4
    )


class _Pairs:
    """A stand-in for a seed: predictors need its pairs alone."""

    setting, seed = TINY_SETTING, 3
    quant_pairs = (np.zeros((20, 1)), np.zeros(20))


def test_predictors_of_few_pairs_are_trained_on_exactly_these():
    for n in TINY_SETTING.sizes:
        assert (~left_out(_Pairs, n)).sum() == n + 4  # a fifth of 20 is held out, and scored


def line(method: str, limit: float, seed: int, top1: float | None) -> Line:
    figures = {"failed": "too tight"} if top1 is None else {"test_top1": top1, "val_top1": top1, "cost": limit}
    return Line(run=Run(question="joint", seed=seed, method=method, quantity="latency", limit=limit), figures=figures)


def test_tables_pair_seeds_and_leave_out_what_failed():
    joint = evidence.QUESTIONS["joint"]
    lines = [line("joint", b, s, (90 + s + 10 * b) / 100) for b in (0.1, 0.2) for s in range(5)]
    lines += [line("agent", b, s, (LEFT[s] + 10 * b - 1) / 100 if (b, s) != (0.1, 4) else None)
              for b in (0.1, 0.2) for s in range(5)]  # fmt: skip
    values = evidence_tables.values_of(joint, lines, "test_top1", 100)
    rows = evidence_tables.tests_of(values, budgets_of_lines(lines), "joint", "agent")
    assert [(row[2], row[3]) for row in rows] == [("0.1 ms", 4), ("0.2 ms", 5), ("all", 4)]
    expected = np.mean([90 + s - (LEFT[s] - 1) for s in range(4)])
    assert [row[4][0] for row in rows] == pytest.approx(
        [expected, np.mean([90 + s - LEFT[s] + 1 for s in range(5)]), expected]
    )
    text = evidence_tables.tables(joint, lines)
    assert "| 0.1 ms | joint | 5 | 93.00 ± 1.58 |" in text
    assert "no result: agent, 0.1 ms, seed 4" in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_digits):
    """A folder with all tiny runs of a seed."""
    folder = tmp_path_factory.mktemp("evidence")
    evidence.main([*ONE_SEED, "--out", str(folder)])
    return folder


def test_lines_are_whole(finished):
    """Every method of every question has a line at every budget, with its figures, cost of search and versions."""
    records = read_jsonl(finished / FILE)
    wanted = [run for question in evidence.QUESTIONS.values() for run in question.runs(TINY_SETTING, seed=7)]
    assert {
        (r["question"], r["seed"], r["method"], r["budget"]["quantity"], r["budget"]["limit"]) for r in records
    } == {(run.question, run.seed, run.method, run.quantity, run.limit) for run in wanted}
    assert len(records) == len(wanted)
    for record in records:
        figures = record["figures"]
        assert record["versions"].keys() >= {"apq", "python", "torch", "commit"}
        if record["question"] in ("joint", "bits", "qfa"):
            assert {"test_top1", "val_top1", "cost", "search", "shared", "cpu_s"} <= figures.keys()
            assert figures["cost"] <= record["budget"]["limit"] * (1 + 1e-9)
            assert figures["search"].keys() == {"measured", "trained_images", "scored_images"}


def test_agents_measure_as_many_as_the_others(finished):
    """Those of channels and bits have their episodes at every budget, random policies as many as the agent."""
    for record in read_jsonl(finished / FILE):
        if record["method"] in ("agent", "random", "sequential"):
            assert record["figures"]["search"]["measured"] == TINY_SETTING.agent.episodes


def test_finished_runs_are_not_made_again(finished, few_digits, capsys):
    before = (finished / FILE).read_bytes()
    evidence.main([*ONE_SEED, "--out", str(finished)])
    assert (finished / FILE).read_bytes() == before
    assert "## Does joint search pay?" in capsys.readouterr().out


def test_a_lost_line_is_made_again_alike(finished, few_digits):
    """Also a torn one, as a kill leaves it: the same seed gives the same figures."""
    lines = (finished / FILE).read_bytes().splitlines(keepends=True)
    lost = json.loads(lines[-1])
    (finished / FILE).write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    evidence.main([*ONE_SEED, "--out", str(finished)])
    again = read_jsonl(finished / FILE)[-1]
    ignored = ("cpu_s",)
    assert {k: v for k, v in again["figures"].items() if k not in ignored} == {
        k: v for k, v in lost["figures"].items() if k not in ignored
    }


def test_a_method_without_a_result_has_a_line_that_says_why(tmp_path, few_digits):
    def measure(run: Run, ground: object) -> None:
        raise NoResult("too tight")

    joint = replace(evidence.QUESTIONS["joint"], measure=measure)
    args = argparse.Namespace(out=tmp_path, seeds=[0], device="cpu")
    evidence.answer([joint], TINY_SETTING, args)
    records = read_jsonl(tmp_path / FILE)
    assert len(records) == len(joint.runs(TINY_SETTING, 0))
    assert {record["figures"]["failed"] for record in records} == {"too tight"}


def test_plots_are_small_and_readable(finished, few_digits):
    evidence.main(["--tiny", "--tables", "--out", str(finished)])
    for question in evidence.QUESTIONS:
        text = (finished / f"{question}.svg").read_text()
        assert text.startswith("<?xml")
        assert len(text) < 60_000
    assert ">sequential</text>" in (finished / "joint.svg").read_text()


def test_runs_of_another_setting_are_refused(finished):
    with pytest.raises(UserError, match="runs of another setting of pairs: give another --out"):
        evidence.main(["--tables", "--out", str(finished)])


def test_bits_borrow_the_runs_of_the_agent(finished):
    lines = read_lines(finished, evidence.settings_of(TINY_SETTING)).values()
    of_bits = [found.run.method for found in evidence.QUESTIONS["bits"].lines(lines)]
    assert of_bits.count("agent") == TINY_SETTING.n_budgets


def test_few_bits_have_equally_many_quantized_epochs(finished):
    """Inheritance to 2 bits has trained at 5, 4, 3 and 2 bits, each for the epochs of a step."""
    epochs = {}
    for record in read_jsonl(finished / FILE):
        if record["question"] == "oqa":
            epochs[record["method"], record["budget"]["limit"]] = record["figures"]["epochs"]
    own = {}
    for bits in (2, 3, 4, 5):
        for way in ("inheritance", "qat"):
            file = finished / "seed-7" / "oqa" / f"{way}-{bits}" / "supernet.pt"
            if file.exists():
                recipe = evidence_oqa.recipe_of(TINY_SETTING, evidence_oqa.steps_to(bits) if way == "qat" else 1)
                own[way, bits] = sum(phase.train.epochs for phase in recipe.phases)
    for bits in evidence_oqa.BITS:
        chain = own["qat", 5] + sum(own["inheritance", b] for b in range(bits, 5))
        assert epochs["inheritance", bits] == epochs["qat", bits] == chain == own["qat", bits]


def test_the_gain_of_the_last_quarter():
    """Of eight epochs the last two are a quarter: the eighth less the sixth. Of three the third less the second."""
    assert evidence_qfa.gain_of_last_quarter([0.1, 0.2, 0.3, 0.4, 0.5, 0.625, 0.7, 0.75]) == 0.125
    assert evidence_qfa.gain_of_last_quarter([0.1, 0.25, 0.75]) == 0.5


def test_bits_are_those_of_the_space():
    found = FASHION_SETTING.bit_search("latency", 0.1)
    assert (found.quantizer, found.min_bit, found.max_bit, found.budget) == (LINEAR, 2, 8, 0.1)
