"""Supernets in the published layouts of MobileNetV3, in files: round trips, what is found from them, and misfits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from apq.bit_widths import at_bits
from apq.checkpoint import load_checkpoint
from apq.errors import UserError
from apq.presets import OQA_MBV3, OQA_MBV3_GLYPHS, QFA_MBV3, QFA_MBV3_GLYPHS, widened
from elastic_nn.convert import main as convert
from elastic_nn.modules.quant_layers import quantizer_keys
from elastic_nn.networks import DynamicProxylessNASNets
from elastic_nn.networks.checkpoint_layout import from_published, to_published
from elastic_nn.networks.published_layouts import layout_of_file
from elastic_nn.networks.supernet_file import build_supernet, load_supernet, save_supernet
from elastic_nn.quantizers import BATCHQUANT, FLOAT, LSQ, MIXED
from elastic_nn.training.inheritance import check_start
from elastic_nn.training.supernet_training import load_start

TWO_BITS = at_bits(OQA_MBV3_GLYPHS, 2)
SMALL = {
    "ofa-mbv3": (OQA_MBV3_GLYPHS, FLOAT),
    "oqa-mbv3": (TWO_BITS, LSQ),
    "qfa-mbv3": (QFA_MBV3_GLYPHS, BATCHQUANT),
}


def lively(net, seed=0):
    """Draw every tensor at random, so that tests notice any that are not copied or that change places."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in net.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator) + 0.1
            tensor.copy_(torch.ones_like(drawn) if key.endswith("seen") else drawn)
    return net.eval()


def check_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("name", SMALL)
def test_layouts_go_there_and_back(name, tmp_path):
    space, scheme = SMALL[name]
    net = lively(build_supernet(space, scheme))
    written = net.published_state_dict()
    assert layout_of_file(written).name == name
    again = lively(build_supernet(space, scheme), seed=1)
    again.load_weights_from_net({f"module.{key}": value for key, value in written.items()})
    check_equal(again, net)
    torch.save({"state_dict": written, "epoch": 3}, tmp_path / "theirs.pth")
    loaded, origin = load_supernet(tmp_path / "theirs.pth", space)
    check_equal(loaded, net)
    assert (loaded.space, origin.recipe) == (space, None)


def test_a_range_counts_as_seen_and_an_empty_one_does_not():
    """Files have no number of images beside the statistics of activations, ours have."""
    net = lively(build_supernet(QFA_MBV3_GLYPHS, BATCHQUANT))
    state = net.published_state_dict()
    prefix = "blocks.1.mobile_inverted_conv.depth_conv.conv.a_quantizers.5.quantizers"
    for edge in ("min", "max"):
        state[f"{prefix}.3.observer.running_{edge}"] = torch.zeros(1)
    state[f"{prefix}.4.observer.num_batches_tracked"] = torch.tensor(7)
    net.load_weights_from_net(state)
    of_bits = net.blocks[1].depthwise.conv.act_quant.of_kernel["5"].of_bits
    assert {bits: part.seen.item() for bits, part in of_bits.items()} == {"2": 1, "3": 0, "4": 7, "8": 1}
    assert {bits: part.calibrated for bits, part in of_bits.items()} == {"2": True, "3": False, "4": True, "8": True}
    assert not net.published_state_dict()[f"{prefix}.4.observer.num_batches_tracked"]  # published code counts none


@pytest.mark.parametrize("name", ["oqa-mbv3", "qfa-mbv3"])
def test_float_weights_leave_quantizers_alone(name):
    space, scheme = SMALL[name]
    source = lively(DynamicProxylessNASNets(space=space), seed=2)
    net = lively(build_supernet(space, scheme))
    before, own = {key: value.clone() for key, value in net.state_dict().items()}, quantizer_keys(net)
    net.load_weights_from_net(source.published_state_dict())
    weights = source.state_dict()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key] if key in own else weights[key]), key


@pytest.mark.parametrize("name", SMALL)
def test_misfits_name_their_keys_and_change_nothing(name):
    space, scheme = SMALL[name]
    net = lively(build_supernet(space, scheme))
    before, good = {key: value.clone() for key, value in net.state_dict().items()}, net.published_state_dict()
    norm = next(key for key in good if key.startswith("blocks.2.") and key.endswith("running_var"))
    cases = [
        ({key: value for key, value in good.items() if key != norm}, f"1 missing \\({norm}\\)"),
        ({**good, "extra.key": torch.zeros(1)}, r"1 extra \(extra.key\)"),
        ({**good, norm: torch.zeros(3)}, f"1 of another shape \\({norm} \\(3,\\) for"),
        ({**good, norm: -good[norm]}, f"1 with negative variances \\({norm}\\)"),
        ({**good, norm: "text"}, f"real numbers only, not {norm}"),
    ]
    for state, match in cases:
        with pytest.raises(UserError, match=match):
            net.load_weights_from_net(state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_other_networks_have_no_published_layout():
    with pytest.raises(UserError, match=r"no published layout fits this network: .* has no place for"):
        build_supernet(QFA_MBV3_GLYPHS, MIXED["lsq-per-bits"]).published_state_dict()
    alone = build_supernet(QFA_MBV3_GLYPHS, BATCHQUANT).get_active_subnet()  # its keys do not have its kernel sizes
    with pytest.raises(UserError, match=r"no place for blocks.1.depthwise.conv.weight_quant.of_bits"):
        to_published(alone, elastic=False)
    alone = lively(build_supernet(TWO_BITS, LSQ).get_active_subnet())
    written = to_published(alone, elastic=False)
    assert "blocks.1.mobile_inverted_conv.depth_conv.conv.sw" in written
    back = from_published(written, alone, elastic=False)
    assert all(torch.equal(back[key], value) for key, value in alone.state_dict().items())


def of_width(width_mult, n_classes=1000):
    """A float supernet as once-for-all would save it."""
    space = replace(widened(OQA_MBV3, width_mult), n_classes=n_classes)
    return {"state_dict": to_published(build_supernet(space, FLOAT))}


@pytest.mark.parametrize(
    ("width_mult", "n_classes", "name"),
    [(1.2, 1000, "qfa-mbv3"), (0.5, 1000, "oqa-mbv3-w0.5"), (0.35, 7, "oqa-mbv3-w0.35-n_classes-7")],
)
def test_widths_and_classes_are_those_of_the_weights(width_mult, n_classes, name, tmp_path):
    torch.save(of_width(width_mult, n_classes), tmp_path / "ofa")
    net, _ = load_supernet(tmp_path / "ofa")
    assert (net.space.name, net.space.n_classes, net.scheme) == (name, n_classes, FLOAT)
    assert net.space.stages == widened(OQA_MBV3, width_mult).stages
    if name == "qfa-mbv3":
        assert net.space == QFA_MBV3


def test_mixed_precision_starts_from_a_released_supernet(tmp_path):
    """`train.py --space qfa-mbv3 --start_from ofa_mbv3_d234_e346_k357_w1.2`, up to its first step."""
    file = tmp_path / "ofa_mbv3_d234_e346_k357_w1.2"
    torch.save(of_width(1.2), file)
    start, record, images = load_start(file)
    check_start(start, QFA_MBV3, BATCHQUANT)
    assert (record["started_from"]["file"], images) == (str(file), None)
    with pytest.raises(UserError, match="other architectures"):
        check_start(start, OQA_MBV3, LSQ)
    wide = replace(widened(OQA_MBV3, 1.2), name="wide")
    check_start(start, wide, LSQ)  # bits and names differ alone


def test_the_command_converts_there_and_back(tmp_path, capsys):
    net = lively(build_supernet(QFA_MBV3_GLYPHS, BATCHQUANT))
    ours, theirs, back = (tmp_path / name for name in ("ours.pt", "theirs.pth", "back.pt"))
    save_supernet(ours, net, "tiny", {"dataset": "glyphs"})
    convert([str(ours), "--out", str(theirs)])
    assert "in the published layout" in capsys.readouterr().out
    assert list(load_checkpoint(theirs)) == ["state_dict"]
    convert([str(theirs), "--out", str(back), "--space", "qfa-mbv3-glyphs", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "space": "qfa-mbv3-glyphs",
        "quantizers": "batchquant-published",
        "file": str(back),
        "published": False,
    }
    check_equal(load_supernet(back)[0], net)
    with pytest.raises(UserError, match="exists"):
        convert([str(ours), "--out", str(theirs)])
    with pytest.raises(UserError, match="records its space"):
        convert([str(ours), "--out", str(tmp_path / "x"), "--space", "qfa-mbv3-glyphs"])
    state = build_supernet(OQA_MBV3_GLYPHS, FLOAT).published_state_dict()
    torch.save({key: value for key, value in state.items() if "feature_mix" not in key}, tmp_path / "cut")
    with pytest.raises(UserError, match=r"feature_mix_layer.* is missing or no convolution"):
        convert([str(tmp_path / "cut"), "--out", str(tmp_path / "x")])
