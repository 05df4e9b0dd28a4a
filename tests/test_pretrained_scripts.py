"""Bits, finetune, report and export of an EfficientNet-Lite through the scripts, on own images with some classes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

from apq.own_networks import LITES
from dataset import load_splits
from dataset.splits import make_loader
from dataset.table import LITE
from elastic_nn.networks.model_file import load_model, save_model
from elastic_nn.networks.named_models import build_model, named_model

search, quant_aware, report, export = (script(name) for name in ("search", "quant_aware", "test", "export"))
NAME, SIDE = "efficientnet_lite0", 64
OUTPUTS = [f"class{i}" for i in range(6)]
FEW = ["--finetune_images", "8", "--val_images", "4", "--recipe", "tiny", "--json"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a network for small images, pictures of two of its six classes, and the names of all."""
    root = tmp_path_factory.mktemp("lite")
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 4)):
        for label in (OUTPUTS[1], OUTPUTS[4]):
            folder = root / "pictures" / part / label
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (80, 72, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(OUTPUTS))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setitem(LITES, NAME, replace(LITES[NAME], side=SIDE))
        patch.setenv("APQ_CACHE", str(root / "cache"))
        spec = replace(named_model(NAME), n_classes=len(OUTPUTS))
        save_model(root / "lite.pt", spec, build_model(spec).state_dict(), None)
        yield root


def printed(capsys, call, *words):
    capsys.readouterr()
    call([*words])
    return json.loads(capsys.readouterr().out)


def found_bits(capsys, exp, ratio, *flags):
    of_network = ["--model", NAME, "--weights", "lite.pt", "--data", "pictures", "--classes", "classes.txt"]
    return printed(capsys, search, *flags, *of_network, *FEW, "--exp_name", exp, "--preserve_ratio", str(ratio))


def test_images_reach_the_network_scaled_as_it_was_trained(here):
    _, spec, _ = load_model(here / "lite.pt")
    splits = load_splits(spec, here / "pictures", outputs=OUTPUTS)
    assert splits.source["scale"] == {"mean": list(LITE.mean), "std": list(LITE.std)}
    for part in (splits.train, splits.calibration, splits.val, splits.test, splits.test.thinned(3)):
        images, labels = next(iter(make_loader(part, 64)))
        codes = images * 128 + 127
        torch.testing.assert_close(codes, codes.round().clamp(0, 255), rtol=0, atol=1e-3)
        assert set(labels.tolist()) <= {1, 4}
    usual = load_splits(replace(spec, name="mobilenet_v2"), here / "pictures", outputs=OUTPUTS)
    assert "scale" not in usual.source


def test_agent_finetune_report_export_and_measurement(here, capsys):
    shown = found_bits(capsys, "haq", 0.7, "--mode", "ddpg", "--train_episode", "2", "--warmup", "1", "--hidden", "8")
    assert shown["cost"] <= shown["budget"]
    quant_aware(["--exp_name", "haq", "--epochs", "1", "--device", "cpu"])
    measured = printed(capsys, report, "--exp_dir", "exps/haq", "--json")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[export]'")
    forms = ("onnx", "onnx-integer", "packed")
    found = printed(capsys, export, "--exp_dir", "exps/haq", "--format", *forms, "--check", "8", "--json")
    for form in forms[1:]:
        checks = [check for check in found[form]["checks"] if check["codes"]]
        assert checks
        assert all(check["other_codes"] == 0 and check["codes"] > 1e5 for check in checks)
    again = printed(capsys, report, "--onnx", "exps/haq/model.integer.onnx", "--data", "pictures", "--json")
    assert (again["n_images"], again["top1"]) == (8, measured["top1"])


def test_sensitivity_and_given_bits(here, capsys):
    flags = ["--type", "bitops", "--loss_images", "4", "--min_bit", "7"]
    shown = found_bits(capsys, "sensitive", 0.9, "--mode", "sensitivity", *flags)
    assert shown["cost"] <= shown["budget"]
    (here / "bits.json").write_text(json.dumps(shown["policy"]))
    flags = ["--model", NAME, "--weights", "lite.pt", "--data", "pictures", "--classes", "classes.txt", "--json"]
    given = printed(
        capsys, search, "--mode", "ddpg", "--policy", "bits.json", *flags, "--type", "bitops", "--exp_name", "given"
    )
    assert given["cost"] == pytest.approx(shown["cost"])
