"""QFA by the scripts: float supernet, mixed precision, pairs, predictor, front, a picked point without finetune."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import script
from few_images import N_TEST

from apq.checkpoint import load_checkpoint
from apq.errors import UserError
from apq.files import read_json, write_json
from apq.presets import QFA_MBV3_GLYPHS
from apq.space import space_to_dict
from elastic_nn.modules.quant_layers import quantizers
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.quantizers import BATCHQUANT, FLOAT, LsqQuantizer
from utils.predictor_files import load_predictor

train, search, quant_aware, report = (script(name) for name in ("train", "search", "quant_aware", "test"))

SPACE = replace(QFA_MBV3_GLYPHS, name="small-qfa", dataset="digits", n_classes=10, resolutions=(24, 32))
MODELS = ["--acc_predictor_dir", "models/small-qfa"]
NSGA2 = ["--mode", "nsga2", "--population", "30", "--generations", "8", *MODELS]
PREPARE = ["--prepare", "acc_quant", *MODELS, "--recipe", "tiny-qfa"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_digits):
    root = tmp_path_factory.mktemp("qfa")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("APQ_CACHE", str(root / "cache"))
        write_json(root / "small.json", space_to_dict(SPACE))
        train(["--space", "small.json", "--recipe", "tiny-sandwich", "--quantizer", "float"])
        train(["--space", "small.json", "--recipe", "tiny-qfa"])
        search([*PREPARE, "--acc_train_sample", "12"])
        search([*NSGA2, "--exp_name", "front"])
    return root


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def test_the_supernets(here):
    real, mixed = (load_supernet(here / f"models/small-qfa{end}/supernet.pt")[0] for end in ("-float", ""))
    assert (real.scheme, mixed.scheme) == (FLOAT, BATCHQUANT)
    operands = quantizers(mixed)
    kernels = [part for operand in operands for part in getattr(operand, "of_kernel", {"": operand}).values()]
    assert {tuple(part.of_bits) for part in kernels} == {("2", "3", "4", "8")}
    slots = 2 * len(SPACE.slots)
    assert len(kernels) == len(operands) + slots * 2  # of depthwise layers, for each of three kernel sizes
    records = read_json(here / "models/small-qfa/training.json")
    assert records["started_from"]["file"] == "models/small-qfa-float/supernet.pt"
    assert [record["phase"] for record in records["phases"]] == ["bits and float", "bits"]
    steps = [part.step for part in mixed.modules() if isinstance(part, LsqQuantizer)]
    assert len(steps) == 4 * len(kernels) / 2  # of the weights
    assert all(step.item() != 0 for step in steps)


def test_pairs_are_measured_without_a_finetune(here):
    predictor = load_predictor(here / "models/small-qfa/acc_quant.pt", SPACE)
    assert (predictor.n_layers, predictor.plain, predictor.quantize) == (3, True, True)
    data = load_checkpoint(here / "models/small-qfa/acc_quant.pt")["data"]
    assert data["n_pairs"] == 12
    assert "finetune" not in data
    assert not (here / "models/small-qfa/acc.pt").exists()


def test_a_point_is_measured_as_it_is_and_may_be_finetuned(here, capsys):
    front = read_json(here / "exps/front/front.json")
    limit = front[len(front) // 2]["objectives"]["latency"]
    search(["--mode", "nsga2", "--front", "exps/front", "--exp_name", "a", "--pick", f"latency<={limit}", *MODELS])
    capsys.readouterr()
    report(["--exp_dir", "exps/a", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["from_supernet"], shown["n_images"]) == (True, N_TEST)
    assert shown["costs"]["full"]["latency_ms"] <= limit * (1 + 1e-12)  # summed in another order
    assert [shown["subnet"]["arch"], shown["subnet"]["policy"]] == read_json(here / "exps/a/arch")
    report(["--exp_dir", "exps/a"])
    assert "as it is in its supernet" in capsys.readouterr().out
    report(["--exp_dir", "exps/a", "--json", "--supernet", "models/small-qfa/supernet.pt"])
    again = json.loads(capsys.readouterr().out)
    assert again["top1"] == shown["top1"]
    quant_aware(["--exp_name", "a", "--recipe", "tiny", "--epochs", "1"])
    capsys.readouterr()
    report(["--exp_dir", "exps/a", "--json"])
    assert not json.loads(capsys.readouterr().out)["from_supernet"]
    with pytest.raises(UserError, match="leave --supernet out"):
        report(["--exp_dir", "exps/a", "--supernet", "models/small-qfa/supernet.pt"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--space", "small.json", "--start_from", "scratch"], "starts from a float one"),
        (["--space", "small.json", "--start_from", "models/small-qfa"], "starts from a float one"),
        (["--space", "small.json", "--start_from", "absent"], "absent"),
        (["--space", "small.json", "--quantizer", "float", "--start_from", "models/small-qfa"], "cannot start from"),
        (
            ["--space", "digits", "--quantizer", "float", "--start_from", "models/small-qfa-float"],
            "has other architectures",
        ),
    ],
)
def test_mistakes_of_training(here, flags, match):
    with pytest.raises(UserError, match=match):
        train([*flags, "--recipe", "tiny-qfa", "--out", "x"])
    assert not (here / "x").exists() or not list((here / "x").iterdir())


def test_bits_must_be_among_what_a_recipe_varies(here):
    flags = ["--space", "small.json", "--start_from", "models/small-qfa-float", "--out", "x"]
    with pytest.raises(UserError, match="tiny-sandwich never varies the bits"):
        train([*flags, "--recipe", "tiny-sandwich"])


def test_another_supernet_beside_the_predictor_is_noticed(here):
    search(["--mode", "nsga2", "--front", "exps/front", "--exp_name", "c", "--pick", "latency<9", *MODELS])
    file = here / "models/small-qfa/supernet.pt"
    before = file.read_bytes()
    data = torch.load(file, weights_only=True)
    data["state_dict"]["classifier.bias"] += 1
    torch.save(data, file)
    try:
        with pytest.raises(UserError, match=r"is not the supernet that .*acc_quant.pt was trained for"):
            report(["--exp_dir", "exps/c"])
        report(["--exp_dir", "exps/c", "--supernet", "models/small-qfa"])
    finally:
        file.write_bytes(before)


def test_full_precision_needs_quantizers_to_mix_with(here):
    flags = ["--space", "small.json", "--quantizer", "float", "--start_from", "models/small-qfa-float"]
    with pytest.raises(UserError, match="tiny-qfa mixes full precision with bits: float"):
        train([*flags, "--recipe", "tiny-qfa", "--out", "x"])


def test_float_pairs_of_a_quantized_supernet_are_refused(here):
    with pytest.raises(UserError, match="trained quantized: gather its pairs with --prepare acc_quant"):
        search(["--prepare", "acc", *MODELS, "--recipe", "tiny-qfa"])


def test_a_float_supernet_has_nothing_to_measure_as_it_is(here):
    search(["--mode", "nsga2", "--front", "exps/front", "--exp_name", "b", "--pick", "latency<9", *MODELS])
    with pytest.raises(UserError, match=r"exps/b has no checkpoint, .* a float supernet, .* quant_aware.py first"):
        report(["--exp_dir", "exps/b", "--supernet", "models/small-qfa-float/supernet.pt"])
