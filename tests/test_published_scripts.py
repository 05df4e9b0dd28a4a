"""The published command lines on files in the published layout, where the published README puts them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image
from published import filled

from apq.errors import UserError
from apq.files import read_json, write_json
from apq.presets import APQ_IMAGENET
from elastic_nn.networks import DynamicProxylessNASNets
from elastic_nn.networks.checkpoint_layout import to_published
from elastic_nn.networks.subnet_file import load_subnet
from elastic_nn.training.recipes import RECIPES
from utils.accuracy_predictor import AccuracyPredictor

search, quant_aware, report = (script(name) for name in ("search", "quant_aware", "test"))


def layout(state):
    return [[key, tuple(value.shape)] for key, value in state.items()]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """models/ and dataset/imagenet: a thousand classes, a few of them with images."""
    root = tmp_path_factory.mktemp("published")
    (root / "models").mkdir()
    supernet = filled(layout(DynamicProxylessNASNets().published_state_dict()), 1)
    torch.save({"state_dict": supernet, "epoch": 3}, root / "models/imagenet-OFA", _use_new_zipfile_serialization=False)
    torch.save(filled(layout(AccuracyPredictor().state_dict()), 1), root / "models/acc_quant.pt")
    rng = np.random.default_rng(0)
    for part, n in (("train", 2), ("val", 2)):
        for c in range(1000):
            (root / f"dataset/imagenet/{part}/n{c:08d}").mkdir(parents=True)
        for c in (3, 500):
            for i in range(n):
                pixels = rng.integers(0, 255, (240, 250, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / f"dataset/imagenet/{part}/n{c:08d}/{i}.JPEG")
    return root


def test_published_command_lines(published, monkeypatch, capsys):
    monkeypatch.chdir(published)
    monkeypatch.setenv("APQ_CACHE", str(published / "cache"))
    recipe = RECIPES[APQ_IMAGENET.recipe]  # of thirty epochs
    monkeypatch.setitem(RECIPES, recipe.name, replace(recipe, finetune=replace(recipe.finetune, epochs=2)))
    search(
        ["--mode=evolution", "--acc_predictor_dir=models", "--exp_name=test", "--constraint=12.80", "--type=latency"]
    )
    (cost,) = read_json(published / "exps/test/lat")
    assert 12 < cost <= 12.8
    assert len(read_json(published / "exps/test/arch")[0]["ks"]) == 21
    assert "published scope" in capsys.readouterr().out
    quant_aware(["--exp_name=test"])
    report(["--exp_dir=exps/test"])
    assert "4 test images" in capsys.readouterr().out

    # The same network as the published code would have saved it, in an experiment that has an arch file alone.
    net, _, _ = load_subnet(published / "exps/test/checkpoint/model_best.pth.tar")
    theirs = published / "exps/theirs"
    (theirs / "checkpoint").mkdir(parents=True)
    (theirs / "arch").write_bytes((published / "exps/test/arch").read_bytes())
    state = {f"module.{key}": value for key, value in to_published(net, elastic=False).items()}
    torch.save({"state_dict": state, "best_acc": 1.0}, theirs / "checkpoint/model_best.pth.tar")
    report(["--exp_dir=exps/test", "--json"])
    report(["--exp_dir=exps/theirs", "--json"])
    ours, published_form = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert ours == published_form

    spec = read_json(theirs / "arch")
    write_json(theirs / "arch", [{**spec[0], "d": [2, 2, 2, 2, 2, 1]}, spec[1]])
    with pytest.raises(UserError, match=r"not the network of exps/theirs/arch.*(missing|extra)"):
        report(["--exp_dir=exps/theirs"])


@pytest.mark.parametrize("index", [0, 17])
def test_an_arch_file_alone_is_priced(golden, tmp_path, monkeypatch, capsys, index):
    """As the published test.py: costs, and no accuracy without weights."""
    monkeypatch.chdir(tmp_path)
    row = golden("apq_cost.json")["rows"][index]
    policy = {key: value for key, value in row["spec"].items() if key.endswith("_bits_setting")}
    write_json(tmp_path / "exps/theirs/arch", [{k: v for k, v in row["spec"].items() if k not in policy}, policy])
    report(["--exp_dir=exps/theirs", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["costs"]["published"]["latency_ms"] == pytest.approx(row["latency_ms"], rel=1e-3)
    assert shown["costs"]["published"]["energy_mj"] == pytest.approx(row["energy_mJ"], rel=1e-2)
    assert (shown["top1"], shown["space"]) == (None, "apq-imagenet")
    report(["--exp_dir=exps/theirs"])
    assert "an arch file alone, no weights to measure" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "exps/theirs").iterdir()] == ["arch"]


def test_too_few_classes_are_named(published, monkeypatch, tmp_path):
    monkeypatch.chdir(published)
    for part in ("train", "val"):
        for c in range(3):
            (tmp_path / part / f"{c}").mkdir(parents=True)
            Image.new("RGB", (240, 240)).save(tmp_path / part / f"{c}/0.jpg")
    search(["--acc_predictor_dir=models", "--exp_name=few", "--constraint=12.80", "--generations=1"])
    with pytest.raises(UserError, match=r"3 training and 3 test classes; apq-imagenet has 1000"):
        quant_aware(["--exp_name=few", "--data", str(tmp_path)])
