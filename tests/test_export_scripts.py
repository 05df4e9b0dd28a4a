"""export.py on the shipped experiments, and test.py on its files."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, script

from apq.errors import UserError
from apq.experiment import Experiment
from apq.manifest import listed_files
from dataset import load_splits
from export import runners
from export.checking import Comparison
from export.formats import data_of

pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[export]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[export]'")
pytest.importorskip("openvino", reason="openvino is not installed: pip install -e '.[export-check]'")
export, report = script("export"), script("test")


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    """A copy of a shipped experiment, of a finetuned network, without what was exported from it in this checkout."""
    own = shutil.ignore_patterns("model.*")
    return shutil.copytree(ROOT / "exps/oqa-2bit", tmp_path_factory.mktemp("exps") / "oqa-2bit", ignore=own)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def exported(capsys, exp, *flags):
    export(["--exp_dir", str(exp), *flags, "--json"])
    return json.loads(capsys.readouterr().out)


def test_all_forms_are_written_checked_and_measured(exp, capsys, monkeypatch):
    found = exported(capsys, exp, "--format", "onnx", "onnx-integer", "packed", "--check", "128")
    for form, name in (("onnx", "model.onnx"), ("onnx-integer", "model.integer.onnx"), ("packed", "model.safetensors")):
        facts, file = found[form], exp / name
        assert (facts["file"], facts["bytes"], facts["failed"]) == (str(file), file.stat().st_size, [])
        assert facts["payload_bytes"] == facts["claimed_bytes"] > facts["published_bytes"]
        checks = {check["name"]: check for check in facts["checks"]}
        assert all(check["n_images"] == 128 for check in checks.values())
    runs = [check for check in found["onnx-integer"]["checks"] if check["name"].startswith("onnxruntime")]
    assert [run["other_codes"] for run in runs] == [0, 0]
    (back,) = (check for check in found["packed"]["checks"] if check["name"] == "read back")
    assert (back["other_codes"], back["codes"]) == (0, runs[0]["codes"])
    assert all(run["codes"] > 1e6 for run in runs)
    monkeypatch.setattr("export.measuring.load_splits", lambda *spec, **given: thin(load_splits(*spec, **given)))
    report(["--onnx", str(exp / "model.integer.onnx"), "--json"])
    measured = json.loads(capsys.readouterr().out)
    assert (measured["n_images"], measured["top1"]) == (128, runs[0]["right"] / 128)


def thin(splits):
    return replace(splits, test=splits.test.thinned(128))


def test_what_a_file_tells_must_fit_it(exp, tmp_path):
    onnx = pytest.importorskip("onnx")
    export(["--exp_dir", str(exp), "--out", str(tmp_path / "good.onnx"), "--check", "0"])
    images = {"side": 16, "in_channels": 3, "n_classes": 5, "resolutions": [0], "dataset": "none"}
    for key, value in (
        *(("images", {name: value}) for name, value in images.items()),
        ("classes", ["a"]),
        ("classes", "x"),
    ):
        model = onnx.load(str(tmp_path / "good.onnx"))
        for entry in model.metadata_props:
            if entry.key == key:
                entry.value = json.dumps({**json.loads(entry.value), **value} if key == "images" else value)
        onnx.save(model, str(tmp_path / "bad.onnx"))
        with pytest.raises(UserError, match=r"bad\.onnx (is damaged|does not tell)|unknown images .none."):
            report(["--onnx", str(tmp_path / "bad.onnx")])
    with pytest.raises(UserError, match="--onnx measures a file alone: leave --exp_dir out"):
        report(["--onnx", str(tmp_path / "good.onnx"), "--exp_dir", str(exp)])


def test_a_new_network_has_no_files_of_the_old_one(exp, tmp_path):
    copy = Experiment(shutil.copytree(exp, tmp_path / "copy"))
    export(["--exp_dir", str(copy.path), "--format", "onnx", "packed", "--check", "0"])
    assert {"model.onnx", "model.safetensors"} <= listed_files(copy.path)
    with copy.edited() as new:  # as finetunes and picks do
        new.drop_exported()
    left = {path.name for path in copy.path.iterdir()}
    assert not {"model.onnx", "model.safetensors"} & (listed_files(copy.path) | left)


def test_an_experiment_that_is_replaced_meanwhile_gets_no_file(exp, tmp_path, monkeypatch):
    copy = Experiment(shutil.copytree(exp, tmp_path / "copy"))

    def meanwhile(*given):
        with copy.edited() as new:
            new.drop_exported()
        return data_of(*given)

    monkeypatch.setattr("export.command.data_of", meanwhile)
    with pytest.raises(UserError, match="was replaced while this run worked; nothing was written"):
        export(["--exp_dir", str(copy.path), "--check", "0"])
    assert not (copy.path / "model.onnx").exists()


def test_lines_for_people(exp, capsys):
    export(["--exp_dir", str(exp), "--format", "onnx-integer", "--check", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{exp}/model.integer.onnx (onnx-integer): ")
    assert "0 of" in lines[2]
    export(["--exp_dir", str(exp), "--format", "packed", "--check", "0"])
    assert capsys.readouterr().out.splitlines()[1] == "not checked"


def test_out_is_one_file_that_exists_once(exp, capsys, tmp_path):
    file = tmp_path / "mine.onnx"
    exported(capsys, exp, "--out", str(file), "--check", "0")
    assert file.exists()
    with pytest.raises(UserError, match="exists"):
        export(["--exp_dir", str(exp), "--out", str(file), "--check", "0"])
    with pytest.raises(UserError, match="--out is the file of one form"):
        export(["--exp_dir", str(exp), "--out", str(file), "--format", "onnx", "packed"])
    with pytest.raises(UserError, match=r"the form packed is a file that ends with \.safetensors"):
        export(["--exp_dir", str(exp), "--out", str(exp / "acc"), "--format", "packed", "--overwrite"])
    exported(capsys, exp, "--out", str(file), "--check", "0", "--overwrite", "--weights", "packed")


def test_a_file_that_is_another_network_ends_with_1(exp, capsys, monkeypatch):
    def wrong(file, *, optimized=True):
        return lambda images: torch.zeros(len(images), 62)

    monkeypatch.setattr(runners, "onnxruntime", wrong)
    with pytest.raises(SystemExit) as ended:
        export(["--exp_dir", str(exp), "--check", "32"])
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.err == "export.py: onnx failed the check\n"
    assert "failed: onnxruntime: only " in captured.out


def test_limits_of_the_check():
    noise = Comparison("float64", n_images=1000, agreed=1000, moved=10)
    quiet = Comparison("float64", n_images=1000, agreed=1000, moved=5)
    fine = {"n_images": 1000, "agreed": 995, "moved": 10}
    assert Comparison("onnxruntime", **fine).fails(quiet) == ""
    assert "agree" in Comparison("onnxruntime", **{**fine, "agreed": 994}).fails(quiet)
    assert "moved" in Comparison("onnxruntime", **{**fine, "moved": 11}).fails(quiet)
    assert Comparison("OpenVINO", **{**fine, "moved": 20}).fails(noise) == ""
    assert "moved" in Comparison("OpenVINO", **{**fine, "moved": 21}).fails(noise)
    loud = Comparison("float64", n_images=1000, agreed=1000, moved=200)
    assert Comparison("OpenVINO", **{**fine, "moved": 50}).fails(loud) == ""
    assert "moved" in Comparison("OpenVINO", **{**fine, "moved": 51}).fails(loud)
    nothing = Comparison("onnxruntime")
    nothing.add(torch.full((4, 3), torch.nan), torch.eye(4, 3), torch.zeros(4, dtype=torch.long))
    assert nothing.moved == 4
    assert Comparison("onnxruntime", **fine, codes=9, other_codes=1).fails(noise) == "1 of 9 codes differ"


def test_limits_of_the_check_of_large_networks():
    """Where float64 moves most images, sizes count: twice as far, and twice as many other classes and two."""
    noise = Comparison("float64", n_images=1000, agreed=990, moved=501, summed=100.0)
    fine = {"n_images": 1000, "agreed": 978, "moved": 1000, "summed": 200.0}
    assert Comparison("onnxruntime", **fine).fails(noise) == ""
    assert "23 images have another class" in Comparison("onnxruntime", **{**fine, "agreed": 977}).fails(noise)
    assert "move by 0.2" in Comparison("onnxruntime", **{**fine, "summed": 200.1}).fails(noise)
    assert "move by nan" in Comparison("onnxruntime", **{**fine, "summed": math.nan}).fails(noise)
    assert "moved" in Comparison("onnxruntime", **{**fine, "agreed": 1000}).fails(replace(noise, moved=500))
    counted = Comparison("onnxruntime")
    counted.add(torch.tensor([[1.0, 0.0], [0.5, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.25]]), torch.zeros(2))
    assert (counted.summed, counted.largest) == (1.5, 1.0)


def test_a_form_that_cannot_hold_the_network_is_refused_before_any_is_written(exp, monkeypatch):
    def refuse(graph, name):
        raise UserError("no")

    monkeypatch.setattr("export.formats.qonnx", refuse)
    names = {path.name for path in exp.iterdir()} - {"model.safetensors"}
    (exp / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no"):
        export(["--exp_dir", str(exp), "--format", "packed", "qonnx", "--check", "0"])
    assert {path.name for path in exp.iterdir()} == names


def test_a_runtime_that_cannot_read_a_file_is_named(exp, capsys, tmp_path, monkeypatch):
    found = exported(capsys, exp, "--weights", "packed", "--check", "16", "--out", str(tmp_path / "few.onnx"))
    assert found["onnx"]["not_tried"] == ["OpenVINO, which cannot read 2-bit integers"]
    assert "OpenVINO, float32" not in {check["name"] for check in found["onnx"]["checks"]}
    monkeypatch.setattr("export.command.find_spec", lambda name: None)
    found = exported(capsys, exp, "--check", "16", "--out", str(tmp_path / "usual.onnx"))
    assert found["onnx"]["not_tried"] == ["OpenVINO, which is not installed: pip install -e '.[export-check]'"]


def test_what_export_cannot_do_is_one_line(exp, tmp_path, capsys):
    with pytest.raises(UserError, match="no experiment at"):
        export(["--exp_dir", str(tmp_path / "none")])
    (tmp_path / "some.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="does not tell its images"):
        report(["--onnx", str(tmp_path / "some.onnx")])
    with pytest.raises(UserError, match="argument --check"):
        export(["--check", "some"])
    with pytest.raises(UserError, match="leave --supernet out"):
        export(["--exp_dir", str(exp), "--supernet", "models/oqa-mbv2-glyphs-2bit", "--check", "0"])
