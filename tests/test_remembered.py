"""Later steps need not be told again what earlier steps were told; files are not replaced without a word."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, script
from test_dataset import make_folder

import elastic_nn.training.experiment_finetune as experiment_finetune
import elastic_nn.training.found_subnet as found_subnet
import elastic_nn.training.supernet_training as supernet_training
import methods.prepare.plan as plan
import report.experiment_report as experiment_report
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, write_json
from apq.genes import sample, subnets_of
from apq.presets import DIGITS, QFA_MBV3, get_space
from apq.search_result import SearchResult, SubnetChoice
from apq.space import space_from_dict, space_to_dict
from dataset import image_folder, recorded_folder
from elastic_nn.networks.subnet import build_subnet
from elastic_nn.networks.supernet_file import build_supernet, load_supernet
from elastic_nn.quantizers import FLOAT, LINEAR
from elastic_nn.training.engine import Accuracy
from lut.__main__ import main as lut
from report.analyse import main as analyse
from utils.qfa import genes_of_published
from utils.qfa import main as qfa

search, quant_aware, report, train = (script(name) for name in ("search", "quant_aware", "test", "train"))


def test_the_image_folder_is_the_one_given_else_the_first_recorded(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    assert image_folder(two, str(one)) == two
    assert image_folder(None, None, str(one), "nowhere") == one
    assert image_folder(None, None, 3) is None
    assert recorded_folder(None) == {}
    with pytest.raises(UserError, match="two, which is not there: give their folder with --data"):
        image_folder(None, str(two))


def test_steps_after_the_first_need_no_data(tmp_path, monkeypatch):
    """--data is given to the training alone; nothing is trained here. Then the folder moves."""
    monkeypatch.chdir(tmp_path)
    cats = make_folder(tmp_path / "cats")
    monkeypatch.setattr(supernet_training, "train_supernet", lambda plan, *_: (build_supernet(plan.space, FLOAT), []))
    train(["--space", "digits", "--recipe", "tiny", "--data", "cats", "--out", "m"])
    net, origin = load_supernet(tmp_path / "m/supernet.pt")
    assert origin.data == str(cats)

    monkeypatch.setattr(plan, "load_splits", lambda space, folder, *rest, **given: pytest.fail(str(folder)))
    with pytest.raises(pytest.fail.Exception, match=str(cats)):
        search(["--prepare", "acc", "--acc_predictor_dir", "m"])

    genes = sample(net.space, 1, np.random.default_rng(0))
    experiment, (subnet,) = Experiment(tmp_path / "a"), subnets_of(net.space, genes)
    choice = SubnetChoice(space=net.space, subnet=subnet, models=tmp_path / "m")
    facts = {"cost": 1.0, "quantity": "latency", "unit": "ms", "cost_model": {"accelerator": {}, "table": None}}
    SearchResult(method="x", choice=choice, **facts).write(experiment)
    cut_out = build_subnet(net.space, subnet, LINEAR)
    monkeypatch.setattr(found_subnet, "quantized_subnet", lambda *_: cut_out)
    monkeypatch.setattr(experiment_finetune, "finetune", lambda *_, **__: (0.5, cut_out.state_dict()))
    quant_aware(["--exp_dir", "a"])
    measured = Accuracy(top1=0.5, top5=1.0, loss=1.0, n_images=9)
    monkeypatch.setattr(experiment_report, "measure", lambda *_: (measured, 0))
    report(["--exp_dir", "a"])
    cats.rename(tmp_path / "dogs")
    with pytest.raises(UserError, match="cats, which is not there: give their folder with --data"):
        report(["--exp_dir", "a"])
    report(["--exp_dir", "a", "--data", "dogs"])


def test_a_cost_table_is_not_replaced_without_a_word(tmp_path):
    file = tmp_path / "table.json"
    lut(["--space", "digits", "--out", str(file)])
    written = file.read_text()
    file.write_text("mine")
    with pytest.raises(UserError, match="exists; choose another --out or give --overwrite"):
        lut(["--space", "digits", "--out", str(file)])
    assert file.read_text() == "mine"
    lut(["--space", "digits", "--out", str(file), "--overwrite"])
    assert file.read_text() == written


def test_a_picture_of_an_analysis_is_not_replaced_without_a_word(tmp_path, capsys):
    shutil.copytree(ROOT / "exps/oqa-4bit", tmp_path / "a")
    (tmp_path / "mine.png").write_text("mine")
    flags = ["depths", str(tmp_path / "a")]
    with pytest.raises(UserError, match="exists; choose another --out or give --overwrite"):
        analyse([*flags, "--out", str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_text() == "mine"
    for told in (False, True):
        analyse(flags)
        assert ("(replaced)" in capsys.readouterr().out) == told


def test_genes_of_the_small_space_are_printed_too(tmp_path, monkeypatch, capsys):
    space = get_space("qfa-mbv3-glyphs")
    genes = sample(space, 1, np.random.default_rng(0))
    choice = SubnetChoice(space=space, subnet=subnets_of(space, genes)[0], models=tmp_path)
    record = {"accelerator": {}, "table": None}
    SearchResult(method="nsga2", choice=choice, cost=1.0, quantity="latency", unit="ms", cost_model=record).write(
        Experiment(tmp_path / "a")
    )
    qfa([str(tmp_path / "a"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert subnets_of(space, genes_of_published(space, np.array(shown["genes"]))) == [choice.subnet]
    assert shown["published_flops"] is None
    qfa([str(tmp_path / "a")])
    assert "as published" not in capsys.readouterr().out
    assert space != QFA_MBV3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data["stages"][1].update(speed=3), r"stages\[1\] has unknown speed"),
        (lambda data: data["operands"][0].update(layer="expand"), r"operands\[0\] has unknown layer"),
        (lambda data: data["operands"][0].pop("choices"), r"operands\[0\] lacks choices"),
        (lambda data: data["stages"][0].update(depths=3), r"stages\[0\]: depths must be a list, not 3"),
        (lambda data: data.update(stages=3), "stages must be a list of objects"),
        (lambda data: data.update(forbidden=[3]), "forbidden must be a list of objects"),
        (lambda data: data.pop("head_width"), "it lacks head_width"),
        (lambda data: data.update(heads=1), "unknown heads"),
    ],
)
def test_a_wrong_key_of_a_space_is_named(change, match):
    data = json.loads(json.dumps(space_to_dict(DIGITS)))
    assert space_from_dict(data) == DIGITS
    change(data)
    with pytest.raises(UserError, match=match) as error:
        space_from_dict(data)
    assert "__init__" not in str(error.value)


@pytest.mark.parametrize(("name", "match"), [("a.state.pt", "is not finished: continue it"), ("x", "has no result")])
def test_a_folder_without_a_result_says_why(tmp_path, name, match):
    write_json(tmp_path / "a" / name, {})
    assert read_json(tmp_path / "a" / name) == {}
    for main in (quant_aware, report):
        with pytest.raises(UserError, match=match) as error:
            main(["--exp_dir", str(tmp_path / "a")])
        assert "Errno" not in str(error.value)
