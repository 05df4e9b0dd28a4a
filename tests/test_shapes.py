"""Drops of shallow-fat and deep-slim architectures: statistics by hand and against scipy, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from apq.bit_widths import at_bits
from apq.errors import UserError
from apq.files import read_json, read_jsonl
from apq.genes import subnets_of
from apq.layers import layers_of
from apq.presets import DIGITS, OQA_MBV2_GLYPHS
from elastic_nn.networks.supernet_file import build_supernet, load_supernet, save_supernet
from elastic_nn.quantizers import FLOAT, LSQ
from elastic_nn.training.inheritance import first_supernet
from elastic_nn.training.pairs import subnet_top1
from elastic_nn.training.session import Session
from report.analyse import main as analyse
from report.architectures import SHALLOW_FAT, Architectures, draw
from report.shapes import difference_of, drops_between, sample_of

CPU = torch.device("cpu")


def group_of(name, flops, real, few):
    depths = np.ones((len(flops), 2), int)
    return Architectures(name, depths, np.array(flops, float), {"real": np.array(real), "few": np.array(few)})


def test_means_errors_and_differences_by_hand():
    a, b = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.6])
    assert (sample_of(a).n, sample_of(a).mean) == (3, pytest.approx(0.2))
    assert sample_of(a).stderr == pytest.approx(0.1 / math.sqrt(3))
    assert (sample_of(b[:1]).mean, sample_of(b[:1]).stderr, sample_of(b[:0]).mean) == (0.4, None, None)
    found = difference_of([(a, b)], np.ones(1))
    assert found.mean == pytest.approx(-0.3)
    assert found.stderr == pytest.approx(math.sqrt(0.01 / 3 + 0.02 / 2))
    # Welch: (1/300 + 1/100)^2 / ((1/300)^2 / 2 + (1/100)^2 / 1) = 1.684 degrees of freedom
    half = stats.t.ppf(0.975, (4 / 300) ** 2 / ((1 / 300) ** 2 / 2 + (1 / 100) ** 2)) * found.stderr
    assert (found.low, found.high) == (pytest.approx(-0.3 - half), pytest.approx(-0.3 + half))
    assert str(found).startswith("-30.00 (")


@pytest.mark.parametrize("seed", range(5))
def test_intervals_are_those_of_scipys_welch_test(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 1, rng.integers(2, 30)), rng.normal(1, 3, rng.integers(2, 30))
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = difference_of([(a, b)], np.ones(1))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_intervals_over_cells_cover_the_difference_in_95_of_100_cases():
    rng, hits, n = np.random.default_rng(0), 0, 2000
    weights = np.array([0.7, 0.3])
    for _ in range(n):
        cells = [(rng.normal(1, 1, 4), rng.normal(0, 3, 6)), (rng.normal(5, 2, 5), rng.normal(3, 1, 3))]
        found = difference_of(cells, weights)
        hits += found.low <= 0.7 * 1 + 0.3 * 2 <= found.high
    assert abs(hits / n - 0.95) < 0.02


def test_equal_values_have_an_interval_of_no_width():
    found = difference_of([(np.full(3, 0.5), np.full(2, 0.25))], np.ones(1))
    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


def test_drops_in_intervals_of_macs_by_hand():
    """Two intervals, 0 to 10 and 10 to 20 MACs. Fat ones drop by 0.1, 0.3 | 0.2, slim ones by 0.4, 0.6 | 0.3, 0.5."""
    fat = group_of("shallow-fat", [0, 9, 20], [0.9, 0.9, 0.9], [0.8, 0.6, 0.7])
    slim = group_of("deep-slim", [1, 2, 10, 11], [0.8] * 4, [0.4, 0.2, 0.5, 0.3])
    found = drops_between(fat, slim, "real", "few", 2)
    first, second = found.rows
    assert (first.flops_from, first.flops_to, second.flops_to) == (0, 10, 20)
    assert (first.shallow_fat.n, first.deep_slim.n, second.shallow_fat.n, second.deep_slim.n) == (2, 2, 1, 2)
    assert (first.shallow_fat.mean, first.deep_slim.mean) == (pytest.approx(0.2), pytest.approx(0.5))
    assert first.difference.mean == pytest.approx(-0.3)
    assert (second.shallow_fat.mean, second.deep_slim.mean) == (pytest.approx(0.2), pytest.approx(0.4))
    assert second.difference is None  # one fat subnet has no variance
    assert (found.whole.shallow_fat.n, found.whole.deep_slim.n) == (3, 4)
    assert found.whole.difference.mean == pytest.approx(0.2 - 0.45)
    assert found.at_equal_flops.mean == pytest.approx(-0.3)
    more = group_of("shallow-fat", [0, 9, 19, 20], [0.9] * 4, [0.8, 0.6, 0.7, 0.5])
    weighted = drops_between(more, slim, "real", "few", 2).at_equal_flops
    assert weighted.mean == pytest.approx((4 * -0.3 + 4 * (0.3 - 0.4)) / 8)
    apart = drops_between(fat, group_of("deep-slim", [19, 20], [1, 1], [1, 1]), "real", "few", 2)
    assert apart.at_equal_flops is None


@pytest.fixture(scope="module")
def made(tmp_path_factory, few):
    """Float, 4-bit and 2-bit supernets of the same small architectures, not trained."""
    root = tmp_path_factory.mktemp("supernets")
    own = {"name": "tiny-oqa", "dataset": "digits", "n_classes": 10, "resolutions": (16, 24), "recipe": None}
    space = replace(OQA_MBV2_GLYPHS, **own)
    torch.manual_seed(0)
    start = build_supernet(space, FLOAT)
    low = replace(at_bits(space, 2), recipe=None)
    for name, of, scheme in (("tiny-float", space, FLOAT), ("tiny", space, LSQ), ("tiny-2bit", low, LSQ)):
        net = first_supernet(of, scheme, start if scheme is LSQ else None, few, 64, CPU)
        if scheme is FLOAT:
            net.load_state_dict(start.state_dict())
        save_supernet(root / "models" / name / "supernet.pt", net, "tiny-sandwich", few.source)
    other = build_supernet(DIGITS, FLOAT)
    save_supernet(root / "models/other/supernet.pt", other, "tiny", few.source)
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch, few):
    (tmp_path / "models").symlink_to(made / "models")
    monkeypatch.setattr("report.measured_architectures.load_splits", lambda *spec, **given: few)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES, GROUPS = ("tiny-float", "tiny", "tiny-2bit"), ("shallow-fat", "deep-slim")
NETS = ["--supernets", *(f"models/{name}" for name in NAMES)]


def accuracies_in(folder):
    """The accuracies in a store, by index."""
    records = read_jsonl(folder / "pairs.jsonl")
    return np.array([record["accuracy"] for record in sorted(records, key=lambda record: record["index"])])


def test_the_command_measures_what_is_missing(here, few, capsys, monkeypatch):
    analyse(["shapes", *NETS, "--n_architectures", "5", "--intervals", "1", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["float"] == "tiny-float"
    assert shown["groups"][0] == "shallow-fat: depths 1, 2; kernels 5, 7; expansions 4, 6"
    assert {name: drops["whole"]["shallow_fat"]["n"] for name, drops in shown["drops"].items()} == {
        "tiny": 3,
        "tiny-2bit": 3,
    }
    folder = here / "dataset/NetInfo/tiny-oqa"
    assert (folder / "shapes.png").read_bytes().startswith(b"\x89PNG")
    assert read_json(folder / "deep-slim/tiny-2bit/meta.json")["space"]["name"] == "tiny-oqa-2bit"
    top1 = {(group, name): accuracies_in(folder / group / name) for group in GROUPS for name in NAMES}
    fat, slim = (np.subtract(top1[group, "tiny-float"], top1[group, "tiny-2bit"]) for group in GROUPS)
    whole = shown["drops"]["tiny-2bit"]["whole"]
    assert whole["shallow_fat"]["mean"] == pytest.approx(fat.sum() / 3)
    assert whole["deep_slim"]["mean"] == pytest.approx(slim.sum() / 2)
    # The second architecture in the 2-bit supernet, as the supernet measures its subnets.
    net, _ = load_supernet(here / "models/tiny-2bit/supernet.pt")
    session = Session(splits=few, device=CPU)
    subnet = subnets_of(net.space, draw(net.space, SHALLOW_FAT, 2, 0))[1]
    assert subnet_top1(net, subnet, session, session.splits.val, 128) == pytest.approx(
        top1["shallow-fat", "tiny-2bit"][1]
    )

    # With more architectures and without a measurement that was lost, the others stay.
    lost = folder / "shallow-fat/tiny/pairs.jsonl"
    lines = lost.read_text().splitlines()
    lost.write_text("\n".join(lines[:-1]) + "\n")
    counted = []

    def count(net, *rest):
        counted.append(net.space.name)
        return 0.5

    monkeypatch.setattr("report.measured_architectures.subnet_top1", count)
    analyse(["shapes", *NETS, "--n_architectures", "6"])
    out = capsys.readouterr().out
    assert len(counted) == 1 + 3  # the lost one, and the third deep-slim one in each supernet
    assert "tiny-2bit: drop of shallow-fat less that of deep-slim, mean of the intervals: " in out
    assert "shapes.png (replaced)" in out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["shapes", "--supernets", "models/tiny", "models/tiny-2bit"], "one float supernet"),
        (["transfer", "--supernets", "models/tiny"], "two supernets or more"),
        (["transfer", "--supernets", "models/tiny", "models/tiny"], "distinct names"),
        (["shapes", "--supernets", "models/tiny-float", "models/other"], "other architectures"),
        (["shapes", "--supernets", "models/tiny-float", "models/nothing"], "no supernet at"),
        (["shapes", *NETS, "--n_architectures", "3"], "at least 4"),
    ],
)
def test_mistakes_are_told_before_any_measurement(here, flags, match, monkeypatch):
    monkeypatch.setattr("report.measured_architectures.subnet_top1", None)
    with pytest.raises(UserError, match=match):
        analyse(flags)


def test_a_picture_of_others_is_told_before_any_measurement(here, monkeypatch):
    monkeypatch.setattr("report.measured_architectures.subnet_top1", None)
    (here / "dataset/NetInfo/tiny-oqa").mkdir(parents=True)
    (here / "dataset/NetInfo/tiny-oqa/shapes.png").write_text("mine")
    with pytest.raises(UserError, match="not a picture of this program"):
        analyse(["shapes", *NETS, "--n_architectures", "4"])


def test_the_fronts_of_supernets_by_the_command(here, monkeypatch, capsys):
    """With made-up accuracies: more MACs are better in full precision, fewer blocks at 4 and 2 bits."""

    def top1(net, subnet, *rest):
        macs = sum(layer.macs for layer in layers_of(net.space, subnet)) / 1e9
        return 0.5 + macs if not net.scheme.quantizes else 0.9 - sum(subnet.d) / 100 + macs

    monkeypatch.setattr("report.measured_architectures.subnet_top1", top1)
    analyse(["transfer", *NETS, "--n_architectures", "40", "--json"])
    shown = json.loads(capsys.readouterr().out)
    rows = {(row["judged_in"], row["found_in"]): row for row in shown["rows"]}
    assert len(rows) == 9
    for name in NAMES:
        assert rows[name, name]["gap"] == 0
    assert rows["tiny-2bit", "tiny-float"]["gap"] > 0
    assert rows["tiny-2bit", "tiny"]["gap"] == pytest.approx(0, abs=1e-12)
    means = shown["depths"]["means"]
    assert means["tiny"] == means["tiny-2bit"] < means["tiny-float"]
    assert sum(shown["depths"]["counts"]["tiny-float"]) == 40
    assert (here / shown["plot"]).read_bytes().startswith(b"\x89PNG")
    assert shown["plot"] == "dataset/NetInfo/tiny-oqa/transfer.png"
    with pytest.raises(UserError, match="seed was 0, is 1; give another folder with --netinfo"):
        analyse(["transfer", *NETS, "--n_architectures", "40", "--seed", "1"])
