"""Analyses of fronts, on hand-made records."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from example_results import found

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import write_json
from apq.genes import largest_subnet, smallest_subnet
from apq.presets import APQ_IMAGENET, DIGITS, get_space
from apq.search_result import read_result
from apq.subnet import architecture_of, spec_of, subnet_from_spec
from report.analyse import main as analyse
from report.diagram import bits_in_words, boxes_of
from report.fronts import depth_counts

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


POINTS = [
    entry([1, 1, 1], 3.0, 10, 0.5),
    entry([1, 1, 1], 4.0, 19, 0.7),
    entry([3, 3, 2], 1.0, 12, 0.4),
    entry([2, 2, 1], 2.0, 15, 0.9),
    entry([3, 2, 2], 1.0, 14, 0.5),
    entry([1, 2, 1], 1.0, 30, 0.8),
    entry([1, 1, 2], 1.0, 35, 0.9),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, front in (("four", POINTS[:3]), ("two", POINTS[2:])):
        subnet = subnet_from_spec(DIGITS, {**front[0]["arch"], **front[0]["policy"]})
        found(DIGITS, subnet, front=front).write(Experiment(tmp_path / "exps" / name))
    return tmp_path


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
        (["depths"], "give the folder of an experiment"),
        (["depths", "exps/four", "--supernets", "models/a"], "--supernets belongs to shapes and transfer"),
        (["shapes", "exps/four"], "shapes measures supernets: give their folders to --supernets"),
        (["transfer"], "transfer measures supernets"),
        (["depths", "exps/four", "--space", "digits"], "belongs to diagram"),
        (["diagram", "exps/four", "exps/two"], "one subnet"),
        (["depths", "exps/plain"], r"no front\.json"),
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
    with pytest.raises(UserError, match=match):
        analyse(flags)
