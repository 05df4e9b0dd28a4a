"""What flags and files tell is refused before any work: no images, no episodes, no pairs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, script

import elastic_nn.training.supernet_training as supernet_training
import methods.coarse_to_fine.search as coarse_to_fine
import methods.evolution.task as evolution
import methods.nsga2.front_search as nsga2
import methods.prepare.plan as plan
import methods.search.float_network as float_network
import methods.sequential.pipeline as pipeline
import methods.sequential.search as sequential
from apq.errors import UserError
from apq.files import write_json
from apq.presets import DIGITS
from apq.space import space_to_dict
from elastic_nn.networks.supernet_file import build_supernet, save_supernet
from elastic_nn.quantizers import FLOAT
from elastic_nn.training.recipe import TrainConfig
from lut.bitfusion import BitFusion
from lut.costs import why_not_priced
from methods.search.settings import BitSearch
from methods.sequential.config import Split
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_files import save_predictor

search, train, quant_aware = (script(name) for name in ("search", "train", "quant_aware"))
WIDE = replace(
    DIGITS, name="wide-bits", operands=tuple(replace(k, choices=(8, 9)) for k in DIGITS.operands), forbidden=()
)
DDPG = ["--mode", "ddpg", "--model", "mobilenet_v2_small"]


class WorkedError(Exception):
    """Work began."""


def work(*args, **options):
    raise WorkedError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the shipped models. Whatever takes long raises `WorkedError`."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    for module in (coarse_to_fine, float_network, plan, sequential, supernet_training):
        monkeypatch.setattr(module, "load_splits", work)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([*DDPG, "--preserve_ratio", "60"], "fraction above 0 and at most 1, not 60"),
        ([*DDPG, "--preserve_ratio", "0"], "fraction above 0"),
        ([*DDPG, "--constraint", "-1"], "must be positive"),
        ([*DDPG, "--constraint", "1e-9"], "below the cheapest policy"),
        ([*DDPG, "--min_bit", "9"], "bits must be from 2 to 8"),
        ([*DDPG, "--lr_a", "-1"], "argument --lr_a: must be positive"),
        (["--mode", "sequential", "--constraint", "0.05", "--min_bit", "9"], "bits must be from 2 to 8"),
        (
            ["--mode", "sequential", "--constraint", "0.05", "--preserve_ratio", "60"],
            "ratios must be above 0, at most 1",
        ),
        (["--mode", "sequential", "--constraint", "0.05", "--population", "1"], "at least 2"),
        (["--mode", "coarse_to_fine", "--kernel_prob", "2"], "kernel_prob"),
        (["--mode", "coarse_to_fine", "--constraint", "1"], "below the cheapest subnet"),
        (["--prepare", "acc", "--overwrite", "--acc_train_sample", "9"], "at least 10 pairs"),
        (
            ["--prepare", "acc_quant", "--acc_predictor_dir", "models/none"],
            "no supernet at .*: train one with train.py",
        ),
        (
            ["--constraint", "0.03", "--acc_predictor_dir", "models/none"],
            "no predictor at .*--prepare acc_quant --acc_pr",
        ),
        (["--mode", "nsga2", "--acc_predictor_dir", "models/none"], "no predictor at .*--prepare acc_quant"),
        (["--mode", "ddpg", "--prepare", "acc"], "--mode ddpg searches, --prepare acc trains .* give one"),
    ],
)
def test_searches_refuse_before_any_work(here, flags, match):
    with pytest.raises(UserError, match=match) as error:
        search(flags)
    assert len(str(error.value)) < 300


def test_what_can_be_done_begins(here):
    """The other side of the test above: the same searches with sound flags reach their images."""
    for flags in (DDPG, ["--mode", "coarse_to_fine"], ["--prepare", "acc", "--overwrite"]):
        with pytest.raises(WorkedError):
            search(flags)


def test_prepare_misses_the_float_predictor_before_it_gathers(here, tmp_path):
    folder = tmp_path / "own"
    save_supernet(folder / "supernet.pt", build_supernet(DIGITS, FLOAT), "tiny", {})
    with pytest.raises(
        UserError, match=r"no predictor at .*own/acc.pt: make it with search.py --prepare acc --acc_pred"
    ):
        search(["--prepare", "acc_quant", "--acc_predictor_dir", str(folder)])


@pytest.mark.parametrize("flags", [["--recipe", "none"], ["--quantizer", "none"], ["--start_from", "nowhere"]])
def test_training_refuses_before_its_images_are_drawn(here, flags):
    with pytest.raises(UserError):
        train(["--space", "glyphs", "--out", "new", *flags])


def test_bits_beyond_the_accelerator_are_told_by_every_step(here, tmp_path, capsys, monkeypatch):
    """BitFusion as published has at most 8 bits; one of 16 bits has costs of 9."""
    assert why_not_priced(DIGITS, BitFusion()) == ""
    assert "at most 8 bits" in why_not_priced(WIDE, BitFusion())
    write_json(tmp_path / "wide.json", space_to_dict(WIDE))
    with pytest.raises(WorkedError):
        train(["--space", "wide.json", "--out", "new", "--recipe", "tiny"])
    assert "searches of this space will need --config or --table" in capsys.readouterr().err
    save_supernet(tmp_path / "own/supernet.pt", build_supernet(WIDE, FLOAT), "tiny", {})
    save_predictor(tmp_path / "own/acc.pt", AccuracyPredictor(WIDE, 8, quantize=False))
    save_predictor(tmp_path / "own/acc_quant.pt", AccuracyPredictor(WIDE, 8))
    own = ["--acc_predictor_dir", "own"]
    with pytest.raises(WorkedError):
        search(["--prepare", "acc_quant", "--overwrite", *own])
    assert "at most 8 bits" in capsys.readouterr().err
    monkeypatch.setattr(evolution.EvolutionFinder, "run", work)
    monkeypatch.setattr(nsga2, "find_front", work)
    modes = (
        ["--constraint", "1", "--type", "bitops"],
        ["--constraint", "1"],
        ["--mode", "nsga2", "--objectives", "accuracy,size"],
        ["--mode", "coarse_to_fine"],
        ["--mode", "sequential", "--constraint", "1", "--max_bit", "8"],
    )
    for mode in modes:
        with pytest.raises(UserError, match="at most 8 bits; give another cost model with --config or --table"):
            search([*mode, *own])
    write_json(tmp_path / "wide-chip.json", {"max_bits": 16})
    with pytest.raises(WorkedError):
        search(["--mode", "nsga2", *own, "--config", "wide-chip.json"])


def test_a_split_that_bits_cannot_end_costs_no_episode(here, monkeypatch):
    """At 4 bits and more a network costs at least a quarter of its cost at 8: a tenth is out of reach."""
    splits = SimpleNamespace(source={}, val=(0,), calibration=(0,))
    monkeypatch.setattr(sequential, "load_splits", lambda *args, **given: splits)
    monkeypatch.setattr(sequential, "check_classes", lambda *args: None)
    for name in ("search_widths", "evaluate", "recalibrate", "finetune"):
        monkeypatch.setattr(pipeline, name, work)
    flags = ["--mode", "sequential", "--generations", "2", "--population", "20", "--constraint", "0.004"]
    with pytest.raises(UserError, match=r"below the cheapest policy, .*raise --preserve_ratio") as error:
        search([*flags, "--preserve_ratio", "0.1"])
    assert not list(here.glob("exps/*/*.state.pt"))
    ratio = float(str(error.value).split(" of the 8-bit cost")[0].rsplit(" ", 1)[1])
    assert 0.1 < ratio <= 1
    with pytest.raises(WorkedError):  # a budget that is not too tight
        search([*flags[:-1], "0.03", "--preserve_ratio", "0.9"])


def test_a_budget_that_limits_nothing_is_told(here, capsys):
    with pytest.raises(WorkedError):
        search([*DDPG, "--constraint", "1e6"])
    assert "limits nothing: the most bits need" in capsys.readouterr().err
    with pytest.raises(WorkedError):
        search(DDPG)
    assert "limits nothing" not in capsys.readouterr().err


def test_a_search_tells_that_its_supernet_is_missing(here, tmp_path, capsys, monkeypatch):
    save_predictor(tmp_path / "own/acc_quant.pt", AccuracyPredictor(DIGITS, 8))
    monkeypatch.setattr(evolution.EvolutionFinder, "run", work)
    with pytest.raises(WorkedError):
        search(["--constraint", "0.03", "--acc_predictor_dir", "own"])
    assert "no supernet at own/supernet.pt: quant_aware.py will need" in capsys.readouterr().err


def test_settings_of_training_are_told_in_few_words():
    for wrong in ({"epochs": 0}, {"lr": -1.0}, {"batch_size": 1}):
        with pytest.raises(UserError, match="epochs >= 1") as error:
            TrainConfig(**{"epochs": 1, "lr": 0.1, **wrong})
        assert len(str(error.value)) < 100


@pytest.mark.parametrize("budget", [float("inf"), float("nan"), 0.0, -1.0])
def test_budgets_are_positive_numbers(budget):
    with pytest.raises(UserError):
        Split(constraint=budget)
    with pytest.raises(UserError):
        Split(constraint=1.0, architecture=budget)
    rest = {"quantizer": "linear", "quantity": "latency", "min_bit": 2, "max_bit": 8, "keep_ends": True}
    with pytest.raises(UserError):
        BitSearch(ratio=0.5, budget=budget, train_images=2, val_images=1, **rest)


def test_the_predictor_step_leaves_experiments_alone(here):
    """It accepts the published flags of an experiment, without effect."""
    with pytest.raises(UserError, match="no supernet at"):
        search(["--prepare", "acc", "--exp_dir", "mine", "--acc_predictor_dir", "nowhere"])
    assert not (here / "mine").exists()
