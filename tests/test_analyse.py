"""Analyses of fronts, on hand-made records."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from example_results import found
from example_spaces import TINY

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import write_json, write_jsonl
from apq.genes import largest_subnet, smallest_subnet
from apq.presets import APQ_IMAGENET, DIGITS, get_space
from apq.search_result import read_result
from apq.subnet import architecture_of, spec_of, subnet_from_spec
from report.analyse import main as analyse
from report.diagram import bits_in_words, boxes_of
from report.fronts import Shapes, compare_shapes, depth_counts, mean_advantage, mean_expansion, shapes_of

POLICY = {kind.setting: [8] * 8 for kind in DIGITS.operands}


def entry(d, e, flops, top1, **more):
    """The record of a digits subnet with these depths and one expansion for all blocks that run (idle slots: 4)."""
    ends = np.cumsum([0, 3, 3])
    e = [
        e if i - start < depth else 4.0
        for start, n, depth in zip(ends, (3, 3, 2), d, strict=True)
        for i in range(start, start + n)
    ]
    arch = {"wid": None, "ks": [3] * 8, "e": e, "d": d}
    return {**more, "arch": arch, "policy": POLICY, "flops": flops, "top1": top1}


COARSE = [
    entry([1, 1, 1], 3.0, 10, 0.5),  # shallow and fat
    entry([1, 1, 1], 4.0, 19, 0.7),  # too
    entry([3, 3, 2], 1.0, 12, 0.4),  # deep and slim
    entry([2, 2, 1], 2.0, 15, 0.9),  # on the medians: neither
    entry([3, 2, 2], 1.0, 14, 0.5),  # deep and slim
    entry([1, 2, 1], 1.0, 30, 0.8),  # the next interval, with its upper edge
    entry([1, 1, 2], 1.0, 35, 0.9),
]
EDGES = np.array([10.0, 20.0, 30.0, 40.0])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, front in (("four", COARSE[:3]), ("two", COARSE[2:])):
        subnet = subnet_from_spec(DIGITS, {**front[0]["arch"], **front[0]["policy"]})
        settings = {"coarse_to_fine": {"flops_min": 10.0, "flops_max": 40.0, "intervals": 3}}
        result = found(DIGITS, subnet, settings=settings, front=front)
        result.write(experiment := Experiment(tmp_path / "exps" / name))
        stages = [*({"stage": "coarse", **record} for record in COARSE), {"stage": "fine", **COARSE[0], "top1": 1.0}]
        write_jsonl(experiment.path / "evaluated.jsonl", stages)
    return tmp_path


def test_expansion_is_of_the_blocks_that_run():
    shapes = shapes_of(DIGITS, COARSE)
    assert shapes.expansion.tolist() == [3, 4, 1, 2, 1, 1, 1]
    assert shapes.total_depth.tolist() == [3, 3, 8, 5, 7, 4, 4]
    assert shapes.flops.tolist() == [record["flops"] for record in COARSE]
    assert mean_expansion(TINY, largest_subnet(TINY)) == 2.0


def test_shallow_fat_against_deep_slim_by_hand():
    first, second, third = compare_shapes(shapes_of(DIGITS, COARSE), EDGES)
    assert (first.n, first.n_shallow_fat, first.n_deep_slim) == (5, 2, 2)
    assert (first.shallow_fat, first.deep_slim) == (pytest.approx(0.6), pytest.approx(0.45))
    assert (second.n, second.shallow_fat) == (0, None)
    assert (third.n, third.n_shallow_fat, third.deep_slim) == (2, 0, None)
    assert (third.flops_from, third.flops_to) == (30, 40)
    assert mean_advantage([first, second, third]) == pytest.approx(0.15)
    assert mean_advantage([second, third]) is None


def test_the_last_interval_has_its_upper_edge():
    shapes = Shapes(np.ones((3, 1)), np.ones(3), np.array([1.0, 2.0, 3.0]), np.ones(3))
    assert [row.n for row in compare_shapes(shapes, np.array([1.0, 2.0, 3.0]))] == [1, 2]


def test_depth_counts():
    assert depth_counts(np.array([3, 3, 5, 9]), [3, 4, 5]) == [2, 0, 1]


def test_depths(here, capsys):
    analyse(["depths", "exps/four", "exps/two", "--json"])
    shown = json.loads(capsys.readouterr().out)
    total = shown["fronts"]["total"]
    assert total["depths"] == [3, 4, 5, 6, 7, 8]
    assert total["counts"] == {"four": [2, 0, 0, 0, 0, 1], "two": [0, 2, 1, 0, 1, 1]}
    assert total["means"] == {"four": pytest.approx(14 / 3), "two": pytest.approx(28 / 5)}
    assert shown["fronts"]["stage 3"]["counts"] == {"four": [2, 1], "two": [2, 3]}
    assert (here / shown["plot"]).read_bytes().startswith(b"\x89PNG")
    analyse(["depths", "exps/four", "--out", "other.png"])
    assert (here / "other.png").exists()
    assert "total: mean" in capsys.readouterr().out


def test_shapes(here, capsys):
    analyse(["shapes", "exps/four", "exps/two", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["intervals"]["four"] == shown["intervals"]["two"]
    assert [row["n"] for row in shown["intervals"]["four"]] == [5, 0, 2]  # the fine one is not counted
    assert shown["mean_advantage"] == {"four": pytest.approx(0.15), "two": pytest.approx(0.15)}
    analyse(["shapes", "exps/four"])
    assert "+15.00 points" in capsys.readouterr().out
    assert (here / "exps/four/shapes.png").exists()


def test_diagram(here, capsys):
    analyse(["diagram", "exps/four", "--json"])
    shown = json.loads(capsys.readouterr().out)
    blocks = shown["blocks"]
    assert [(b["slot"], b["stage"], b["kernel"], b["expansion"], b["bits"]) for b in blocks] == [
        (0, 0, 3, 3.0, "W8A8"),
        (3, 1, 3, 3.0, "W8A8"),
        (6, 2, 3, 3.0, "W8A8"),
    ]
    assert [(b["in_channels"], b["mid_channels"], b["out_channels"]) for b in blocks] == [
        (8, 24, 8),
        (8, 24, 8),
        (8, 24, 16),
    ]
    assert (here / "exps/four/diagram.png").read_bytes().startswith(b"\x89PNG")
    analyse(["diagram", "exps/four/arch", "--json"])
    assert json.loads(capsys.readouterr().out)["blocks"] == blocks
    space = get_space("oqa-mbv3-2bit")
    spec = spec_of(space, smallest_subnet(space))
    write_json(here / "lone", [spec["arch"], spec["policy"]])
    analyse(["diagram", "lone", "--space", "oqa-mbv3-2bit", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert {b["bits"] for b in shown["blocks"]} == {"W2A2"}
    assert (shown["resolution"], len(shown["blocks"])) == (128, sum(spec["arch"]["d"]))


def test_bits_in_words():
    policy = {"pw_w_bits_setting": 4, "pw_a_bits_setting": 6, "dw_w_bits_setting": 8, "dw_a_bits_setting": 6}
    net = largest_subnet(APQ_IMAGENET)
    assert bits_in_words(APQ_IMAGENET, net, 0) == "W8A8"
    assert bits_in_words(APQ_IMAGENET, smallest_subnet(APQ_IMAGENET), 0) == "W4A4"
    spec = {**architecture_of(APQ_IMAGENET, net), **{key: [bits] * 21 for key, bits in policy.items()}}
    box = boxes_of(APQ_IMAGENET, subnet_from_spec(APQ_IMAGENET, spec))[20]
    assert box.label == "6x\n7x7\npw W4A6\ndw W8A6"
    assert len(boxes_of(APQ_IMAGENET, smallest_subnet(APQ_IMAGENET))) == 11


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["depths", "nowhere"], "no experiment at nowhere"),
        (["depths", "exps/four", "--space", "digits"], "belongs to diagram"),
        (["diagram", "exps/four", "exps/two"], "one subnet"),
        (["depths", "exps/plain"], r"no front\.json"),
        (["shapes", "exps/plain"], r"no evaluated\.jsonl"),
        (["shapes", "exps/damaged"], "not from a coarse-to-fine search"),
        (["depths", "exps/damaged"], "not from a coarse-to-fine search"),
        (["diagram", "exps/four/front.json"], "ks"),
        (["diagram", "exps/four/config.json"], "a list of objects"),
        (["speeds", "exps/four"], "speeds"),
    ],
)
def test_mistakes_get_one_clear_line(here, flags, match):
    plain = replace(read_result(Experiment(here / "exps/four")), front=None)
    for name in ("plain", "damaged"):
        plain.write(Experiment(here / "exps" / name))
    write_json(here / "exps/damaged/front.json", [{"flops": 1}])
    write_jsonl(here / "exps/damaged/evaluated.jsonl", [{"stage": "coarse"}])
    with pytest.raises(UserError, match=match):
        analyse(flags)
