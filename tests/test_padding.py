"""Paddings as operations of their own, as networks from TensorFlow have them, in every form of export."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apq.errors import UserError
from apq.policy import LINEAR
from elastic_nn.networks.quantize_model import quantize_model
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.calibration import calibrate_ranges
from export.formats import Form, data_of
from export.graph import IMAGE as IMAGE_NAME
from export.graph import Graph, Node, folded
from export.packed import HEADER, VERSIONS, packed_data, read_packed
from export.padding import without_pads
from export.run import run_as_trained, run_exactly
from export.trace import trace

IMAGE = (3, 13, 13)
NAMES = ("0", "3", "6", "9")


class Odd(nn.Sequential):
    """Convolutions with paddings of one and two pixels more at the end, and one whose padding is a function."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1))),
            *(nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.ReLU6(), nn.ZeroPad2d((1, 2, 2, 1))),
            *(nn.Conv2d(8, 12, 5, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            nn.Conv2d(12, 5, 3, padding=1),
        )

    def forward(self, x):
        for layer in [*self][:-1]:
            x = layer(x)
        return self[-1](F.pad(x, (1, 0, 0, 1))).mean((2, 3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Odd().eval()
    quantize_model(made, NAMES, scheme_named(LINEAR), dict.fromkeys(NAMES, False), IMAGE)
    calibrate_ranges(made, torch.randn(16, *IMAGE))
    return made.requires_grad_(False)


def test_paddings_become_a_part_of_layers_and_values_stay(net):
    images = torch.randn(4, *IMAGE)
    graph = trace(net, IMAGE)
    assert "pad" not in [node.op for node in graph.nodes]
    assert [layer.pads for layer in graph.layers.values()] == [(1,) * 4, (0, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1)]
    assert torch.equal(run_as_trained(graph, images), net(images))
    torch.testing.assert_close(run_exactly(folded(graph), images), net(images), rtol=1e-4, atol=1e-4)


def test_an_asymmetric_padding_of_codes_against_a_loop(net):
    """Every sum of the layer's codes, place by place, in whole numbers."""
    graph, codes = folded(trace(net, IMAGE)), {}
    run_exactly(graph, torch.randn(2, *IMAGE), codes.__setitem__)
    layer, x = graph.layers["6"], codes["6"].long().numpy()  # (2, 8, H, W)
    top, left, bottom, right = layer.pads
    around = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    weights = layer.weights.codes.numpy()
    rows, columns = ((n - 5) // 2 + 1 for n in around.shape[2:])
    expected = np.zeros((2, len(weights), rows, columns), np.int64)
    for n, c, i, j in np.ndindex(expected.shape):
        expected[n, c, i, j] = (around[n, :, 2 * i : 2 * i + 5, 2 * j : 2 * j + 5] * weights[c]).sum()
    found = layer.run(codes["6"].double(), layer.weights.codes.double())
    assert np.array_equal(found.long().numpy(), expected)


def test_a_padding_that_no_layer_takes_stays():
    """A norm after the padding; the first of two paddings."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.Flatten()).eval()
    images = torch.randn(2, *IMAGE)
    graph = trace(alone, IMAGE)
    assert graph.nodes[0].op == "pad"
    with torch.no_grad():
        assert torch.equal(run_as_trained(graph, images), alone(images))
    twice = nn.Sequential(nn.ZeroPad2d(1), nn.ZeroPad2d((0, 2, 0, 0)), nn.Conv2d(3, 2, 3), nn.Flatten()).eval()
    graph = trace(twice, IMAGE)
    assert [node.op for node in graph.nodes] == ["pad", "layer", "flatten"]
    with torch.no_grad():
        torch.testing.assert_close(run_as_trained(graph, images), twice(images))


@pytest.mark.parametrize("layer", [nn.ZeroPad2d((0, -1, 0, 0)), nn.ConstantPad2d(1, 0.5)])
def test_other_paddings_are_refused(layer):
    with pytest.raises(UserError, match="only rows and columns of 0"):
        trace(nn.Sequential(layer, nn.Conv2d(3, 2, 3), nn.Flatten()), IMAGE)


@pytest.mark.parametrize(("offset", "ops"), [(0.0, ["layer"]), (0.3, ["pad", "layer"])])
def test_offsets_keep_their_padding_apart(net, offset, ops):
    """With an offset, as BatchQuant has it, zero before the rounding is another value after it."""
    layer = trace(net, IMAGE).layers["6"]
    moved = layer.inputs.rounding._replace(offset=torch.tensor([offset]))
    layer = replace(layer, inputs=replace(layer.inputs, rounding=moved), padding=(0, 0), padding_end=None)
    pad = Node(name="pad", op="pad", inputs=(IMAGE_NAME,), shape=(8, 9, 9), settings={"pads": (2, 1, 1, 2)})
    graph = Graph(
        image_shape=(8, 6, 6), nodes=(pad, Node(name="6", op="layer", inputs=("pad",), shape=(12, 3, 3), layer=layer))
    )
    merged, images = without_pads(graph), torch.rand(2, 8, 6, 6)
    assert [node.op for node in merged.nodes] == ops
    assert torch.equal(run_as_trained(merged, images), run_as_trained(graph, images))


def test_packed_files_keep_the_padding_and_older_readers_refuse_it(net, tmp_path):
    safe_open = pytest.importorskip("safetensors", reason="pip install -e '.[export]'").safe_open
    graph = folded(trace(net, IMAGE))
    (tmp_path / "m.safetensors").write_bytes(packed_data(graph, {}))
    back = read_packed(tmp_path / "m.safetensors")
    assert [layer.pads for layer in back.layers.values()] == [layer.pads for layer in graph.layers.values()]
    images = torch.randn(2, *IMAGE)
    assert torch.equal(run_exactly(back, images), run_exactly(graph, images))
    with safe_open(str(tmp_path / "m.safetensors"), "numpy") as file:
        assert json.loads(file.metadata()[HEADER])["version"] == VERSIONS[1]


@pytest.mark.parametrize("form", ["onnx", "onnx-integer", "qonnx"])
def test_files_compute_the_same_in_onnxruntime(net, tmp_path, form):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[export]'")
    from export import runners

    graph, images = trace(net, IMAGE), torch.randn(8, *IMAGE)
    (tmp_path / "m.onnx").write_bytes(data_of(graph, Form(name=form, packed_weights=False, metadata={})))
    if form == "qonnx":
        pytest.importorskip("qonnx", reason="qonnx is not installed: pip install -e '.[export-check]'")
        found = runners.qonnx(tmp_path / "m.onnx")(images)
    elif form == "onnx":
        found = runners.onnxruntime(tmp_path / "m.onnx")(images)
    else:
        codes = {}
        exact = run_exactly(folded(graph), images, codes.__setitem__)
        found, own = runners.onnxruntime_codes(tmp_path / "m.onnx")(images)
        assert torch.equal(found, exact)
        assert all(torch.equal(own[name].float(), code) for name, code in codes.items())
    torch.testing.assert_close(found, net(images), rtol=1e-3, atol=1e-2)
