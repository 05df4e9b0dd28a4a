"""The scripts end to end on a tiny training, and their error messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, script
from few_images import N_TEST

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, read_jsonl, write_json
from apq.presets import DIGITS
from apq.resume import Resume
from utils.predictor_files import load_predictor

search, quant_aware, report, train = (script(name) for name in ("search", "quant_aware", "test", "train"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_digits):
    """A folder in which everything was made from scratch by the tiny recipe."""
    root = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("APQ_CACHE", str(root / "cache"))
        train(["--space", "digits", "--recipe", "tiny"])
        search(["--prepare", "acc", "--recipe", "tiny"])
        search(["--prepare", "acc_quant", "--acc_train_sample", "12", "--recipe", "tiny"])
        search([*SEARCH, "--exp_name", "demo"])
        quant_aware(["--exp_name", "demo", "--recipe", "tiny"])
    return root


SEARCH = ["--constraint", "0.05", "--generations", "5", "--population", "20"]


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def test_everything_is_there(here):
    assert {p.name for p in (here / "models/digits").iterdir()} == {
        "supernet.pt",
        "acc.pt",
        "acc_quant.pt",
        "training.json",
    }
    assert len(read_jsonl(here / "dataset/NetInfo/digits/acc/pairs.jsonl")) == 24
    assert len(read_jsonl(here / "dataset/NetInfo/digits/acc_quant/pairs.jsonl")) == 12
    names = {p.name for p in (here / "exps/demo").iterdir()}
    files = {"arch", "lat", "acc", "config.json", "history.jsonl", "history.png", "made_by.json"}
    assert names == {*files, "checkpoint"}
    assert [p.name for p in (here / "exps/demo/checkpoint").iterdir()] == ["model_best.pth.tar"]


def test_search_keeps_the_budget_and_repeats(here, capsys):
    for name in ("a", "b"):
        search([*SEARCH, "--exp_name", name, "--json", "--seed", "4"])
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first.pop("exp_dir"), second.pop("exp_dir")) == ("exps/a", "exps/b")
    assert first == second
    assert 0 < first["cost"] <= 0.05
    assert first["cost"] == pytest.approx(first["costs"]["full"]["latency_ms"])
    assert read_json(here / "exps/a/lat") == [first["cost"]]
    assert read_json(here / "exps/a/arch") == [first["subnet"]["arch"], first["subnet"]["policy"]]


@pytest.mark.parametrize(
    ("kind", "budget", "field"),
    [("energy", 0.05, "energy_mj"), ("bitops", 9e6, "bitops"), ("size", 6000, "size_bytes")],
)
def test_every_budget_type(here, capsys, kind, budget, field):
    search(["--type", kind, *SEARCH, "--constraint", str(budget), "--exp_name", kind, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["costs"]["full"][field] == pytest.approx(found["cost"])
    assert found["cost"] <= budget


def test_search_on_a_table_of_ones_own(here, capsys):
    from lut.__main__ import main as write_table

    write_json(here / "slow.json", {"clock_mhz": 250})
    write_table(["--space", "digits", "--config", "slow.json", "--out", "slow-table.json"])
    capsys.readouterr()
    flags = [*SEARCH, "--constraint", "0.08", "--json"]
    search([*flags, "--table", "slow-table.json", "--exp_name", "table"])
    search([*flags, "--config", "slow.json", "--exp_name", "slow"])
    by_table, by_model = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert by_table["subnet"] == by_model["subnet"]
    assert by_table["cost"] == pytest.approx(by_model["cost"])


def test_costs_are_reported_as_the_search_priced_them(here, capsys):
    write_json(here / "wide.json", {"columns": 64})
    write_json(here / "ones.json", {key: {"latency": 1.0, "energy": 2.0} for key in table_of_digits(here)})
    small = [*SEARCH, "--constraint", "30", "--scope", "published"]
    for flags, name in ((["--config", "wide.json"], "priced-wide"), (["--table", "ones.json"], "priced-ones")):
        search([*small, *flags, "--exp_name", name, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["costs"]["published"]["latency_ms"] == pytest.approx(found["cost"])
        quant_aware(["--exp_name", name])
        capsys.readouterr()
        report(["--exp_dir", f"exps/{name}", "--json"])
        shown = json.loads(capsys.readouterr().out)
        assert shown["costs"] == found["costs"]
        assert shown["priced_by"] == found["priced_by"]
    assert shown["costs"]["published"]["energy_mj"] == 2 * shown["costs"]["published"]["latency_ms"]
    assert shown["costs"]["full"]["latency_ms"] is None  # the table lacks the first block
    report(["--exp_dir", "exps/priced-ones"])
    assert "not known" in capsys.readouterr().out
    report(["--exp_dir", "exps/priced-ones", "--config", "wide.json", "--json"])
    assert "columns 64" in json.loads(capsys.readouterr().out)["priced_by"]


def table_of_digits(folder):
    """Keys of the published scope alone."""
    from lut.bitfusion import BitFusion
    from lut.table import build

    return build(replace(DIGITS, budget_scope="published"), BitFusion())


def test_report_is_measured(here, capsys):
    report(["--exp_dir", "exps/demo", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["n_images"] == N_TEST
    assert 0 <= shown["top1"] <= shown["top5"] <= 1
    assert shown["costs"]["full"]["latency_ms"] > shown["costs"]["published"]["latency_ms"] > 0
    write_json(here / "exps/demo/acc", [0.123])  # never read back
    report(["--exp_dir", "exps/demo"])
    assert f"{shown['top1']:.2%}" in capsys.readouterr().out


def test_prepare_resumes(here, capsys):
    path = here / "dataset/NetInfo/digits/acc_quant/pairs.jsonl"
    before = path.read_text()
    path.write_text("".join(before.splitlines(keepends=True)[:-1]))
    search(["--prepare", "acc_quant", "--acc_train_sample", "12", "--recipe", "tiny", "--json", "--overwrite"])
    assert path.read_text() == before
    shown = json.loads(capsys.readouterr().out)
    scores = shown["scores"]
    assert scores["rmse"] > 0
    assert any("only 2 pairs were held out" in warning for warning in shown["warnings"])
    record = torch.load(here / "models/digits/acc_quant.pt", weights_only=True)
    assert record["scores"] == scores
    assert record["bands"] == shown["bands"]
    assert [band["n"] for band in shown["bands"]["bands"]] == [2]
    assert record["data"]["n_pairs"] == 12


def test_prepare_trains_members_and_kernels(here, capsys, tmp_path):
    shutil.copytree(here / "models/digits", tmp_path / "m")
    models = ["--acc_predictor_dir", str(tmp_path / "m"), "--overwrite"]
    ask = ["--prepare", "acc_quant", "--acc_train_sample", "12", "--recipe", "tiny"]
    for flags, members in ((["--members", "3"], 3), (["--predictor", "kernel"], None)):
        search([*ask, *models, *flags])
        assert "held out, in bands of" in capsys.readouterr().out
        predictor = load_predictor(tmp_path / "m/acc_quant.pt")
        assert getattr(predictor, "members", None) == members
        search([*SEARCH, *models, "--exp_name", "risky", "--risk", "1"])
        assert "1 spreads lower" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--prepare", "acc_quant", "--members", "3"], ["--prepare", "acc"]])
def test_a_kernel_has_no_members_and_is_not_of_float_pairs(here, flags):
    with pytest.raises(UserError, match="--predictor kernel has no --members"):
        search([*flags, "--predictor", "kernel", "--overwrite", "--recipe", "tiny"])


def test_a_finetune_is_replaced_only_by_a_finished_one(here, monkeypatch):
    import elastic_nn.training.finetune as module

    search([*SEARCH, "--exp_name", "twice"])
    quant_aware(["--exp_name", "twice", "--recipe", "tiny"])
    folder = here / "exps/twice"
    before = [(folder / name).read_bytes() for name in ("acc", "checkpoint/model_best.pth.tar")]
    with Experiment(folder).adding("model.onnx") as exported:
        exported.write_bytes(b"of the weights before")
    again = ["--exp_name", "twice", "--overwrite", "--lr", "0.05", "--epochs", "3"]
    save = Resume.save

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            quant_aware(again)
    assert before == [(folder / name).read_bytes() for name in ("acc", "checkpoint/model_best.pth.tar")]
    assert exported.exists()
    (folder / "acc").unlink()
    with pytest.raises(UserError, match="another finetune"):
        quant_aware(["--exp_name", "twice"])
    epochs = []
    train = module.train_one_epoch
    monkeypatch.setattr(module, "train_one_epoch", lambda *a, **k: epochs.append(a[2]) or train(*a, **k))
    quant_aware(again)
    assert epochs == [1, 2]  # it continued
    assert (folder / "checkpoint/model_best.pth.tar").read_bytes() != before[1]
    assert not exported.exists()  # it would be another network


@pytest.mark.parametrize(
    ("main", "flags", "match"),
    [
        (search, [], "--constraint"),
        (search, ["--constraint", "-1"], "-1"),
        (search, ["--constraint", "nan"], "nan"),
        (search, ["--constraint", "1e-6"], "cheapest"),
        (search, ["--constraint", "0.05", "--exp_name", "demo"], "--overwrite"),
        (search, ["--constraint", "0.05", "--acc_predictor_dir", "nowhere"], "nowhere"),
        (search, ["--constraint", "0.05", "--type", "weight"], "weight"),
        (search, ["--constraint", "0.05", "--population", "0"], "population"),
        (search, ["--constraint", "0.05", "--config", "absent.json"], "absent"),
        (search, ["--prepare", "acc"], "--overwrite"),
        (search, ["--prepare", "acc", "--overwrite", "--seed", "9"], "seed"),
        (search, ["--prepare", "acc", "--overwrite", "--recipe", "tiny", "--acc_train_sample", "0"], "at least 10"),
        (
            search,
            ["--prepare", "acc", "--constraint", "1"],
            r"unrecognized arguments: --constraint 1 .*--prepare acc",
        ),
        (
            search,
            ["--constraint", "0.05", "--data", "x"],
            "--measure, --recipe, --data and --deterministic belong to --refine",
        ),
        (search, ["--constraint", "0.05", "--seed", "-1"], "at least 0"),
        (search, ["--constraint", "0.05", "--exp_name", "../up"], "plain name"),
        (search, ["--constraint", "0.05", "--exp_dir", "models/digits/acc.pt/x"], "not a folder"),
        (search, ["--constraint", "0.05", "--config", "a.json", "--table", "b.json"], "not allowed with"),
        (train, ["--out", "models/digits/acc.pt/x"], "not a folder"),
        (report, ["--exp_dir", "exps/demo", "--batch_size", "0"], "at least 1"),
        (quant_aware, ["--exp_name", "absent"], "absent"),
        (quant_aware, ["--exp_name", "demo"], "--overwrite"),
        (quant_aware, ["--exp_name", "demo", "--overwrite", "--epochs", "0"], "epochs"),
        (report, ["--exp_dir", "exps/absent"], "absent"),
        (report, ["--exp_dir", "exps/demo", "--data", "nowhere"], "nowhere"),
        (train, ["--space", "digitz"], "digitz"),
        (train, ["--out", "x", "--ema", "1.5"], "between 0 and 1"),
        (train, ["--out", "x", "--accumulate", "0"], "at least 1"),
        (train, ["--space", "digits"], "--overwrite"),
        (train, ["--space", "apq-imagenet"], "--data"),
        (train, ["--space", "digits", "--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_get_one_clear_line(here, main, flags, match):
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file() and "cache" not in p.parts}
    with pytest.raises(UserError, match=match):
        main(flags)
    assert before == {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file() and "cache" not in p.parts}


def test_damaged_checkpoints_are_refused(here, tmp_path):
    for name in ("models/digits/acc_quant.pt", "models/digits/supernet.pt"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((here / name).read_bytes()[:1000])
    with pytest.raises(UserError, match="acc_quant"):
        search(["--constraint", "0.05", "--acc_predictor_dir", str(tmp_path / "models/digits"), "--exp_name", "x"])
    with pytest.raises(UserError, match="supernet"):
        search(["--prepare", "acc", "--acc_predictor_dir", str(tmp_path / "models/digits")])
    assert not (here / "exps/x").exists()


RECORD = {"space": {}, "acc_predictor_dir": "m", "accelerator": {}, "table": None}


@pytest.mark.parametrize("config", [{}, [], {**RECORD, "space": 1}, {**RECORD, "acc_predictor_dir": 7}])
def test_damaged_records_are_refused(here, config):
    search([*SEARCH, "--exp_name", "record", "--overwrite"])
    write_json(here / "exps/record/config.json", config)
    with pytest.raises(UserError, match=r"config\.json"):
        quant_aware(["--exp_name", "record"])
    (here / "exps/record/config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        quant_aware(["--exp_name", "record"])


def test_weights_of_another_kind_are_refused(here):
    for change in ({"state_dict": [1]}, {"state_dict": {"a": 1}}, {"space": 3}, {"space": {"name": []}}):
        data = torch.load(here / "models/digits/supernet.pt", weights_only=True)
        torch.save({**data, **change}, here / "odd.pt")
        with pytest.raises(UserError):
            quant_aware(["--exp_name", "demo", "--overwrite", "--supernet", "odd.pt"])
        network = torch.load(here / "exps/demo/checkpoint/model_best.pth.tar", weights_only=True)
        (here / "exps/odd/checkpoint").mkdir(parents=True, exist_ok=True)
        torch.save({**network, **change}, here / "exps/odd/checkpoint/model_best.pth.tar")
        with pytest.raises(UserError):
            report(["--exp_dir", "exps/odd"])


def test_pairs_of_another_supernet_are_not_mixed_in(here):
    train(["--recipe", "tiny", "--seed", "1", "--out", "models/other"])
    with pytest.raises(UserError, match="supernet"):
        search(["--prepare", "acc", "--acc_predictor_dir", "models/other"])
    assert not (here / "models/other/acc.pt").exists()


def test_published_quantizers_by_name(here):
    search([*SEARCH, "--exp_name", "published"])
    quant_aware(["--exp_name", "published", "--recipe", "tiny", "--quantizer", "linear-published"])
    schemes = {}
    for name in ("published", "demo"):
        weights = torch.load(here / f"exps/{name}/checkpoint/model_best.pth.tar", weights_only=True)
        schemes[name] = weights["scheme"]
    assert schemes == {"published": "linear-published", "demo": "linear"}
    report(["--exp_dir", "exps/published"])
    asked = ["--prepare", "acc_quant", "--acc_train_sample", "13", "--recipe", "tiny", "--overwrite"]
    with pytest.raises(UserError, match='quantizer was "linear", is "linear-published"'):
        search([*asked, "--quantizer", "linear-published"])


def test_changed_arch_is_noticed(here):
    search([*SEARCH, "--exp_name", "other", "--seed", "1"])
    quant_aware(["--exp_name", "other", "--recipe", "tiny"])
    arch = read_json(here / "exps/other/arch")
    arch[1]["pw_w_bits_setting"] = [4 if b == 8 else 8 for b in arch[1]["pw_w_bits_setting"]]
    write_json(here / "exps/other/arch", arch)
    with pytest.raises(UserError, match="finetune it again"):
        report(["--exp_dir", "exps/other"])


@pytest.mark.parametrize("name", ["search", "quant_aware", "test", "train"])
def test_command_lines(name, tmp_path):
    def call(*flags):
        command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    shown = call("--help")
    assert shown.returncode == 0
    assert "--device" in shown.stdout
    assert "--json" in shown.stdout
    wrong = call("--nonsense")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    absent = call({"search": "--constraint=1", "train": "--space=nowhere.json"}.get(name, "--exp_dir=nowhere"))
    assert absent.returncode == 2
    assert "nowhere" in absent.stderr or "models/digits" in absent.stderr
    assert len(absent.stderr.strip().splitlines()) == 1
