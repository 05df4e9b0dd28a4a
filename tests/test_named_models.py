"""Networks by name: construction, files, training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torchvision
from conftest import script
from torch import nn

from apq.errors import UserError
from apq.genes import largest_subnet
from apq.model import ModelSpec, model_from_dict, model_to_dict, subnet_model
from apq.presets import DIGITS
from apq.resume import Resume
from dataset import load_splits
from dataset.imagenet import image_folder_model
from elastic_nn.modules.batch_dropout import BatchDropout
from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.networks.model_file import load_model, save_model
from elastic_nn.networks.named_models import build_model, named_model, use_elastic_norms
from lut.traced import traced_layers

train = script("train")

SUBNET = subnet_model(DIGITS, largest_subnet(DIGITS))


def test_only_our_small_networks_are_for_small_images():
    assert (named_model("mobilenet_v3_small").dataset, named_model("mobilenet_v3_small").resolution) == (
        "imagenet",
        224,
    )
    assert (named_model("mobilenet_v2_small").dataset, named_model("mobilenet_v2_small").resolution) == ("glyphs", 32)


@pytest.mark.parametrize(
    ("name", "layers", "params", "macs"),
    [
        ("mobilenet_v1", 28, 4_231_976, 568_740_352),  # the paper's 4.2 and 569 million
        ("mobilenet_v2", 53, 3_504_872, 300_774_272),
        ("resnet50", 54, 25_557_032, 4_089_184_256),
        ("mobilenet_v1_small", 16, 45_182, 420_864),
        ("mobilenet_v2_small", 23, 23_742, 916_800),
    ],
)
def test_named_networks_have_their_layers(name, layers, params, macs):
    spec = named_model(name)
    net = build_model(spec)
    traced = traced_layers(net, spec.resolution, in_channels=spec.in_channels)
    assert len(traced) == layers
    assert sum(layer.macs for layer in traced) == macs
    assert sum(parameter.numel() for parameter in net.parameters()) == params
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == layers - 1  # all but the classifier
    assert all(type(norm) is ElasticBatchNorm2d for norm in norms)
    assert all(module.training for module in net.modules())


def test_elastic_norms_compute_the_same_and_keep_their_settings():
    torch.manual_seed(0)
    plain = torchvision.models.mnasnet0_5(weights=None, num_classes=5).train()
    images, before = torch.randn(4, 3, 64, 64), plain.state_dict()
    settings = [(m.eps, m.momentum, m.affine) for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.random.fork_rng():
        expected = plain(images)
    plain.load_state_dict(before)
    use_elastic_norms(plain)
    torch.testing.assert_close(plain(images), expected)
    assert list(plain.state_dict()) == list(before)
    assert [(m.eps, m.momentum, m.affine) for m in plain.modules() if isinstance(m, ElasticBatchNorm2d)] == settings


def test_dropout_of_networks_by_name_does_not_depend_on_processes():
    plain = torchvision.models.mobilenet_v2(weights=None, num_classes=5)
    expected = {name: module.p for name, module in plain.named_modules() if isinstance(module, nn.Dropout)}
    net = build_model(replace(named_model("mobilenet_v2"), n_classes=5))
    dropouts = {name: module for name, module in net.named_modules() if isinstance(module, nn.Dropout)}
    assert {name: module.p for name, module in dropouts.items()} == expected == {"classifier.0": 0.2}
    assert {type(module) for module in dropouts.values()} == {BatchDropout}


@pytest.mark.parametrize("spec", [named_model("resnet18", "digits"), named_model("mobilenet_v1_small"), SUBNET])
def test_a_spec_survives_json(spec):
    assert model_from_dict(json.loads(json.dumps(model_to_dict(spec)))) == spec


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"resolution": 0}, "resolution"),
        ({"n_classes": "9"}, "n_classes"),
        ({"name": ""}, "name"),
        ({"name": "subnet"}, "space"),
        ({"color": 1}, "color"),
    ],
)
def test_bad_specs_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        model_from_dict({**model_to_dict(named_model("resnet18")), **change})
    with pytest.raises(UserError, match="lacks"):
        model_from_dict({"name": "resnet18"})
    with pytest.raises(UserError, match="belong"):
        replace(SUBNET, name="resnet18")
    with pytest.raises(UserError, match="its space digits"):
        replace(SUBNET, n_classes=11)


@pytest.mark.parametrize(
    ("name", "match"),
    [("mobilenet_v3", "nearest: .*mobilenet_v2"), ("googlenet", "auxiliary"), ("vgg11", "does not run on images of 8")],
)
def test_networks_that_cannot_be_built(name, match):
    with pytest.raises(UserError, match=match):
        build_model(ModelSpec(name=name, dataset="x", in_channels=1, n_classes=3, resolution=8))


def test_own_files_rebuild_the_network(tmp_path):
    for spec in (named_model("mobilenet_v1_small", "digits"), SUBNET):
        net = build_model(spec).eval()
        save_model(tmp_path / "m.pt", spec, net.state_dict(), {"dataset": "digits"}, val_top1=0.5)
        loaded, found, images = load_model(tmp_path / "m.pt")
        assert (found, images) == (spec, {"dataset": "digits"})
        x = torch.randn(2, 1, 32, 32)
        assert torch.equal(loaded.eval()(x), net(x))
    with pytest.raises(UserError, match="holds a network of name subnet, not resnet18"):
        load_model(tmp_path / "m.pt", "resnet18")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("n_classes", [1000, 7])
def test_torchvision_files_fit(tmp_path, prefix, n_classes):
    source = (
        torchvision.models.squeezenet1_1(num_classes=n_classes)
        if prefix
        else torchvision.models.resnet18(num_classes=n_classes)
    )
    name = "squeezenet1_1" if prefix else "resnet18"
    state = {prefix + key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save({"state_dict": state} if prefix else state, tmp_path / "w.pth")
    net, spec, images = load_model(tmp_path / "w.pth", name)
    assert spec == replace(named_model(name), n_classes=n_classes)
    assert images is None
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net.eval()(x), source.eval()(x))


def test_misfits_name_the_file_and_the_keys(tmp_path):
    state = build_model(named_model("mobilenet_v2_small")).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth does not say"):
        load_model(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth, model mobilenet_v1_small: .*missing \(features\.1\.0\.0") as caught:
        load_model(tmp_path / "w.pth", "mobilenet_v1_small")
    assert "\n" not in str(caught.value)
    torch.save({"model": model_to_dict(named_model("mobilenet_v2_small")), "state_dict": [1]}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth.*list"):
        load_model(tmp_path / "w.pth")


QUICK = ["--model", "mobilenet_v2_small", "--images", "digits", "--recipe", "tiny", "--epochs", "3"]


def test_training_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train([*QUICK, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [p.name for p in (tmp_path / "models/mobilenet_v2_small").iterdir()] == ["model.pt"]
    net, spec, images = load_model(tmp_path / shown["model"])
    assert (spec, images) == (named_model("mobilenet_v2_small", "digits"), load_splits(spec).source)
    assert 0 < shown["val_top1"] <= 1
    save = Resume.save

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train([*QUICK, "--out", "killed"])
    with pytest.raises(UserError, match="another training"):
        train([*QUICK, "--out", "killed", "--lr", "0.2"])
    train([*QUICK, "--out", "killed"])
    resumed = load_model(tmp_path / "killed/model.pt")[0].state_dict()
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in net.state_dict().items())


def test_training_on_a_folder(tmp_path, monkeypatch):
    from test_dataset import make_folder

    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "cats")
    assert image_folder_model(SUBNET, folder).space.name == "digits-cats"
    train(["--model", "mobilenet_v1_small", "--data", str(folder), "--recipe", "tiny"])
    _, spec, _ = load_model(tmp_path / "models/mobilenet_v1_small/model.pt")
    assert (spec.n_classes, spec.in_channels, spec.resolution, spec.dataset) == (3, 3, 32, "imagenet")
    with pytest.raises(UserError, match="give --recipe"):
        train(["--model", "mobilenet_v1_small", "--data", str(folder), "--out", "x"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--model", "mobilenet_v2_smal"], "mobilenet_v2_small"),
        (["--model", "resnet18", "--space", "digits"], "not allowed with"),
        (["--images", "glyphs"], "belongs to --model"),
        (["--space", "digits", "--epochs", "3"], "belongs to --model"),
        ([*QUICK, "--images", "cats"], "invalid choice"),
        ([*QUICK, "--data", "x"], "leave --images digits out"),
        ([*QUICK, "--lr", "0"], "argument --lr: must be positive"),
        (["--model", "resnet18"], "--data"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, monkeypatch, flags, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match):
        train(flags)
    assert list(tmp_path.iterdir()) == []
