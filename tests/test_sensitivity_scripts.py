"""Bits by sensitivity through the scripts: search, finetune, report, kills, several processes, error messages."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, script
from few_images import IN_OTHER_PROCESSES, N_TEST

from apq.errors import UserError
from apq.files import read_json, read_jsonl
from methods.sensitivity.losses import OPERANDS, LossMeasurement

search, quant_aware, report, train = (script(name) for name in ("search", "quant_aware", "test", "train"))
MODEL = ["--model", "mobilenet_v1_small"]
QUICK = ["--mode", "sensitivity", *MODEL, "--recipe", "tiny", "--loss_images", "64"]
RATIOS = {"linear": 0.8, "kmeans": 0.1}
LINEAR = [*QUICK, "--preserve_ratio", "0.8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_digits):
    """A folder with a network trained by the tiny recipe, and one finetuned experiment of each quantizer."""
    root = tmp_path_factory.mktemp("sensitivity")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("APQ_CACHE", str(root / "cache"))
        train([*MODEL, "--images", "digits", "--recipe", "tiny", "--epochs", "2"])
        for quantizer, ratio in RATIOS.items():
            words = ["--quantizer", quantizer, "--preserve_ratio", str(ratio)]
            search([*QUICK, *words, "--exp_name", quantizer])
            quant_aware(["--exp_name", quantizer, "--epochs", "1"])
    return root


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def printed(capfd, call, *words):
    capfd.readouterr()
    call([*words])
    return capfd.readouterr().out


@pytest.mark.parametrize(("quantizer", "ratio"), RATIOS.items())
def test_search_finetune_and_test(here, capfd, quantizer, ratio):
    folder = here / "exps" / quantizer
    names = {"acc", "bits.png", "checkpoint", "config.json", "history.jsonl", "history.png", "lat", "made_by.json"}
    assert {path.name for path in folder.iterdir()} == {*names, "model.pt", "policy.json"}
    config, history = read_json(folder / "config.json"), read_jsonl(folder / "history.jsonl")
    strategy = read_json(folder / "policy.json")["strategy"]
    assert config["mode"] == "sensitivity"
    assert config["ratio"] <= ratio
    assert config["cost"] <= config["budget"]
    linear = quantizer == "linear"
    n_layers = len(strategy)
    assert len(history) == (7 * 2 * (n_layers - 2) if linear else 8 * n_layers)
    increases = {(r["layer"], r["operand"], r["bits"]): r["increase"] for r in history}
    layers = list(dict.fromkeys(layer["name"] for layer in read_json(folder / "policy.json")["layers"]))
    rows = dict(zip(layers, strategy, strict=True))
    if linear:
        assert (strategy[0], strategy[-1]) == ([8, -1], [8, 8])
        picked = [(name, *part) for name in layers[1:-1] for part in zip(OPERANDS, rows[name], strict=True)]
    else:
        picked = [(name, "weights", rows[name]) for name in layers]
    assert config["sensitivity"]["predicted_increase"] == pytest.approx(sum(increases[key] for key in picked))

    text = printed(capfd, report, "--exp_dir", f"exps/{quantizer}")
    assert f"{quantizer} policy of mobilenet_v1_small, {N_TEST} test images" in text
    assert f"<= {config['budget']:g}" in text
    words = [
        *QUICK,
        "--quantizer",
        quantizer,
        "--preserve_ratio",
        str(ratio),
        "--exp_name",
        "again",
        "--overwrite",
        "--json",
    ]
    shown = json.loads(printed(capfd, search, *words))
    assert shown["policy"] == strategy
    assert shown["episode"] == config["episode"]
    assert {key: shown[key] for key in ("float_loss", "predicted_increase", "measured_increase")}.items() <= config[
        "sensitivity"
    ].items()
    assert (here / "exps/again/history.jsonl").read_text() == (folder / "history.jsonl").read_text()


def test_the_report_says_what_was_predicted_and_measured(here, capfd):
    text = printed(capfd, search, *LINEAR, "--exp_name", "said", "--overwrite")
    found = read_json(here / "exps/said/config.json")
    losses = found["sensitivity"]
    assert f"rises by {losses['predicted_increase']:.4f} as predicted, {losses['measured_increase']:.4f} as" in text
    assert f"top-1 {found['episode']['accuracy']:.2%} after the short finetune of an episode" in text
    assert "64 training images" in text


def test_other_budgets(here, capfd):
    """In energy, in bytes, and by measurements in CSV. A larger budget never predicts a larger loss."""
    (here / "table.csv").write_text(
        "\n".join(f"{i},{w},{a},{w * a}" for i in range(16) for w in (2, 8) for a in (2, 8))
    )
    predicted = []
    for words in (
        ["--type", "energy", "--preserve_ratio", "0.8"],
        ["--type", "energy", "--preserve_ratio", "0.9"],
        ["--type", "size", "--preserve_ratio", "0.5", "--no-keep_ends", "--min_bit", "3"],
    ):
        shown = json.loads(printed(capfd, search, *QUICK, *words, "--exp_name", "other", "--overwrite", "--json"))
        assert shown["cost"] <= shown["budget"]
        predicted.append(shown["predicted_increase"])
    assert predicted[1] <= predicted[0]
    assert min(min(row) for row in shown["policy"][1:]) >= 3
    with pytest.raises(UserError, match=r"lacks layer 1 \(.*\) at some of its bits"):
        search([*QUICK, "--table", "table.csv", "--exp_name", "other", "--overwrite"])


def interrupted_after(n, monkeypatch):
    """Measurements from now on are counted, and interrupted after n of them."""
    own, measured = LossMeasurement.loss, []

    def counted(self, case):
        if len(measured) == n:
            raise KeyboardInterrupt
        measured.append(case)
        return own(self, case)

    monkeypatch.setattr(LossMeasurement, "loss", counted)
    return measured


def test_continues_after_an_interruption(here, monkeypatch):
    words = [*LINEAR, "--exp_name", "killed"]
    with monkeypatch.context() as patch:
        interrupted_after(9, patch)
        with pytest.raises(KeyboardInterrupt):
            search(words)
    left = {path.name for path in (here / "exps/killed").iterdir()}
    assert left == {"sensitivity.state.json", "sensitivity.state.jsonl"}
    with pytest.raises(UserError, match=r"belongs to another search: sensitivity\.seed was 0, is 1; give --overwrite"):
        search([*words, "--seed", "1"])
    with pytest.raises(UserError, match=r"sensitivity\.state\.json; choose another --exp_name or give --overwrite"):
        search(["--mode", "ddpg", *MODEL, "--recipe", "tiny", "--exp_name", "killed"])
    measured = interrupted_after(None, monkeypatch)
    search(words)
    whole = len(read_jsonl(here / "exps/linear/history.jsonl")) + 1
    assert len(measured) == whole - 9
    for name in ("policy.json", "history.jsonl", "lat"):
        assert (here / "exps/killed" / name).read_text() == (here / "exps/linear" / name).read_text()
    assert not list((here / "exps/killed").glob("*state*"))


def test_the_budget_may_change_after_a_kill(here, monkeypatch):
    """Losses do not depend on it."""
    words = [*QUICK, "--exp_name", "changed"]
    with monkeypatch.context() as patch:
        interrupted_after(9, patch)
        with pytest.raises(KeyboardInterrupt):
            search([*words, "--preserve_ratio", "0.75"])
    measured = interrupted_after(None, monkeypatch)
    search([*words, "--preserve_ratio", "0.9"])
    assert len(measured) == len(read_jsonl(here / "exps/linear/history.jsonl")) + 1 - 9


def test_processes_share_the_measurements(here, two_processes):
    line = [ROOT / "search.py", *LINEAR, "--exp_name", "shared"]
    for run in two_processes(line, here, **IN_OTHER_PROCESSES):
        assert run.returncode == 0, run.stderr
    for name in ("policy.json", "history.jsonl"):
        assert (here / "exps/shared" / name).read_text() == (here / "exps/linear" / name).read_text()
    assert not list((here / "exps/shared").glob("*state*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "sensitivity"], "--mode sensitivity needs --model"),
        ([*QUICK, "--preserve_ratio", "0.1"], r"below the cheapest policy, which needs 0\.0"),
        ([*QUICK, "--constraint", "1e-9"], "below the cheapest policy"),
        ([*LINEAR, "--constraint", "1"], "one budget"),
        ([*QUICK, "--quantizer", "kmeans", "--type", "latency"], "floating point"),
        ([*QUICK, "--loss_images", "1"], "--loss_images"),
        ([*QUICK, "--exp_name", "linear"], "exists; choose another"),
        ([*QUICK, "--lr_a", "1"], r"unrecognized arguments: --lr_a 1 .*--mode sensitivity --help"),
        ([*QUICK, "--use_top5"], "unrecognized arguments: --use_top5"),
        ([*QUICK, "--model", "exps/linear"], "holds the policy"),
    ],
)
def test_mistakes(here, words, message):
    name = [] if "--exp_name" in words else ["--exp_name", "none"]
    with pytest.raises(UserError, match=message) as error:
        search([*words, *name])
    assert "\n" not in str(error.value)
    assert not (here / "exps/none").exists()
