"""Exported files in foreign runtimes: they compute the network, and the check sees where one does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from exported_networks import SPACES, network
from test_frozen import quantized_model
from torch import nn

from apq.errors import UserError
from apq.onnx_graph import OPSET_INT2, OnnxGraph
from apq.space import FULL_PRECISION
from dataset.table import DIGITS as DIGITS_SCALE
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.quantize_model import quantize_model
from elastic_nn.quantizers import KMEANS, LINEAR, Rounding
from elastic_nn.training.calibration import calibrate_ranges
from export import onnx_file, runners
from export.checking import compare
from export.frozen import Codes, FrozenLayer, Weights
from export.graph import IMAGE, Graph, Node, folded
from export.image_codes import RoundedImages, image_codes, with_image_codes
from export.integer_file import integer
from export.onnx_file import qcdq, qonnx, without_idle_clips
from export.run import run_exactly
from export.trace import trace

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[export]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[export]'")
LABELS = torch.zeros(16, dtype=torch.long)


def traced(name):
    net, images = network(name)
    return net, images, trace(net, tuple(images.shape[1:]))


def saved(made, path):
    path.write_bytes(made.data({"space": "made up"}))
    return path


def checked(net, graph, images, *, runners=None, code_runners=None):
    """The first comparison of a file with the network, and why the file is not the network."""
    labels = LABELS[: len(images)]
    check = compare(net, folded(graph), [(images, labels)], runners or {}, code_runners or {})
    return check.files[0], check.files[0].fails(check.noise)


@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "as written"])
@pytest.mark.parametrize("name", SPACES)
def test_all_codes_are_those_of_the_reference(name, optimized, tmp_path):
    net, images, graph = traced(name)
    file = saved(integer(folded(graph), name), tmp_path / "net.onnx")
    run = runners.onnxruntime_codes(file, optimized=optimized)
    found, why = checked(net, graph, images, code_runners={"runtime": run})
    assert (found.other_codes, why) == (0, "")
    assert found.codes > 10_000
    logits = runners.onnxruntime(file, optimized=optimized)(images)
    assert torch.equal(logits, run_exactly(folded(graph), images))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", SPACES)
def test_fake_quantized_files_agree(name, runtime, tmp_path):
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed: pip install -e '.[export-check]'")
    net, images, graph = traced(name)
    file = saved(qcdq(graph, name), tmp_path / "net.onnx")
    logits = getattr(runners, runtime)(file)(images)
    with torch.no_grad():
        expected = net(images)
    close = (logits - expected).abs().amax(1) <= 1e-3 * expected.std()
    assert close.float().mean() >= 0.75  # values at the edge between two codes may fall on either side
    assert torch.equal(logits.argmax(1)[close], expected.argmax(1)[close])


@pytest.mark.parametrize("write", [integer, qcdq])
def test_norms_before_layers_are_for_channels(write, tmp_path):
    """As in DenseNet. A folded norm without a layer before it is a product and a sum for each channel."""
    torch.manual_seed(0)
    norm, images = nn.BatchNorm2d(3), torch.randn(5, 3, 6, 6)
    net = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(1), nn.Linear(144, 2))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    names = ["2", "5"]
    quantize_model(net.eval(), names, LINEAR, dict.fromkeys(names, True))
    for layer in quantized_layers(net).values():
        layer.set_bits(4, 8)
    calibrate_ranges(net, images)
    file = saved(write(folded(trace(net, (3, 6, 6))), "net"), tmp_path / "net.onnx")
    with torch.no_grad():
        assert torch.allclose(runners.onnxruntime(file)(images), net(images), atol=1e-4)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("offset", [0.002, -0.002])
def test_tiny_offsets_are_not_lost(runtime, offset, tmp_path):
    """OpenVINO leaves out what is added before rounding where it is below 0.00255 of a code, unless it is kept apart.

    Half of these values are within the offset of the edge between two codes, so half would get another code.
    """
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed: pip install -e '.[export-check]'")
    rounding = Rounding(*(torch.tensor([value]) for value in (0.8, 0.0, 1.0, offset)))
    codes = Codes(bits=3, lowest=0, highest=7, rounding=rounding)
    same = torch.eye(4)[:, :, None, None]
    first = FrozenLayer(weights=Weights(bits=FULL_PRECISION, codes=same), inputs=None, bias=None)
    last = FrozenLayer(weights=Weights(bits=2, codes=same.long(), step=torch.ones(1)), inputs=codes, bias=None)
    steps = (("first", "layer", IMAGE, first), ("relu", "relu", "first", None), ("last", "layer", "relu", last))
    nodes = (Node(name=n, op=op, inputs=(x,), shape=(4, 8, 8), layer=layer) for n, op, x, layer in steps)
    graph = Graph(image_shape=(4, 8, 8), nodes=tuple(nodes))
    file = saved(qcdq(graph, "net"), tmp_path / "net.onnx")
    near = torch.linspace(-1.9, 1.9, 256).view(1, 4, 8, 8) * abs(offset)
    images = (near + torch.arange(1, 5).view(1, 4, 1, 1) - 0.5) * 0.8
    expected = torch.from_numpy(np.round(images.numpy() / 0.8 + offset)).sub(offset) * 0.8
    found = getattr(runners, runtime)(file)(images)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["lsq", "linear"])
def test_qonnx_agrees(name, tmp_path):
    pytest.importorskip("qonnx", reason="qonnx is not installed: pip install -e '.[export-check]'")
    net, images, graph = traced(name)
    file = saved(qonnx(graph, name), tmp_path / "net.onnx")
    found, why = checked(net, graph, images[:4], runners={"qonnx": runners.qonnx(file)})
    assert (found.agreed, why) == (4, "")


def test_qonnx_refuses_by_name():
    _, _, graph = traced("batchquant")
    with pytest.raises(UserError, match=r"inputs of blocks\.0\.depthwise\.conv have an offset, as BatchQuant learns"):
        qonnx(graph, "net")
    net, images = quantized_model(KMEANS)
    graph = trace(net, tuple(images.shape[1:]))
    with pytest.raises(UserError, match=r"QONNX has no k-means: layer features\.0\.0 has centroids"):
        qonnx(graph, "net")
    with pytest.raises(UserError, match=r"k-means has no whole numbers: features\.0\.0 has centroids"):
        integer(folded(graph), "net")


def test_kmeans_is_a_gather(tmp_path):
    net, images = quantized_model(KMEANS)
    graph = trace(net, tuple(images.shape[1:]))
    file = saved(qcdq(graph, "net"), tmp_path / "net.onnx")
    found, why = checked(net, graph, images, runners={"runtime": runners.onnxruntime(file)})
    assert (found.agreed, found.moved, why) == (len(images), 0, "")
    gathers = [node for node in onnx.load(str(file)).graph.node if node.op_type == "Gather"]
    assert len(gathers) == len(graph.layers)


def test_packed_weights_have_few_bits_in_the_file(tmp_path):
    _, images, graph = traced("batchquant")
    assert {layer.weights.bits for layer in graph.layers.values()} >= {2, 3, 4}
    file, usual = (saved(qcdq(graph, "net", packed=packed), tmp_path / f"{packed}.onnx") for packed in (True, False))
    assert file.stat().st_size < usual.stat().st_size
    model = onnx.load(str(file))
    assert model.opset_import[0].version == OPSET_INT2
    kinds = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    assert kinds >= {"INT2", "INT4", "INT8"}
    assert torch.equal(runners.onnxruntime(file)(images), runners.onnxruntime(usual)(images))


def test_batches_of_any_size_run(tmp_path):
    _, images, graph = traced("linear")
    file = saved(integer(folded(graph), "net"), tmp_path / "net.onnx")
    run = runners.onnxruntime(file)
    assert torch.equal(torch.cat([run(images[:1]), run(images[1:])]), run(images))


def test_images_as_codes_make_the_first_layer_whole(tmp_path):
    net, images, graph = traced("linear")
    codes = image_codes(DIGITS_SCALE, 8)
    # 0 and 1 become -0.81197 and 1.84761: 255 steps of 0.0104297, and 0 is the code 77.85, so 78
    assert codes.step == pytest.approx((1 / 0.376) / 255)
    assert codes.zero_point == round(0.3053 * 255)
    rounded = with_image_codes(graph, codes)
    assert not next(iter(graph.layers.values())).whole
    assert next(iter(rounded.layers.values())).whole
    file = saved(integer(folded(rounded), "net"), tmp_path / "net.onnx")
    run = runners.onnxruntime_codes(file)
    found, why = checked(RoundedImages(net, codes), rounded, images, code_runners={"runtime": run})
    assert (found.other_codes, why) == (0, "")


def test_only_clips_that_do_nothing_are_left_out():
    _, _, graph = traced("lsq")
    left = {node.name for node in without_idle_clips(graph).nodes}
    for node in graph.nodes:
        if node.op != "relu6":
            assert node.name in left
            continue
        users = [user.layer for user in graph.users()[node.name]]
        idle = all(user and user.inputs and user.inputs.step * user.inputs.highest <= 6 for user in users)
        assert (node.name not in left) == idle
    assert len(left) < len(graph.nodes)


# What went wrong in other exporters must be seen.


def test_a_dropped_clip_is_seen(tmp_path, monkeypatch):
    net, images, graph = traced("lsq")
    monkeypatch.setattr(onnx_file, "clipped", lambda made, codes, x: x)
    file = saved(qcdq(graph, "net"), tmp_path / "net.onnx")
    found, why = checked(net, graph, images, runners={"runtime": runners.onnxruntime(file)})
    assert "moved" in why or "agree" in why
    assert found.moved == len(images)


def test_a_dropped_clip_of_codes_is_seen(tmp_path, monkeypatch):
    net, images, graph = traced("lsq")
    monkeypatch.setattr("export.integer_file.clipped", lambda made, codes, x: x)
    file = saved(integer(folded(graph), "net"), tmp_path / "net.onnx")
    run = runners.onnxruntime_codes(file)
    found, why = checked(net, graph, images, code_runners={"runtime": run})
    assert found.other_codes > 0
    assert why == f"{found.other_codes} of {found.codes} codes differ"


def test_a_rounded_offset_is_seen(tmp_path):
    """BatchQuant's offset is a fraction of a code. Rounded into the zero point it is another network."""
    net, images, graph = traced("batchquant")

    def rounded(node):
        if node.layer is None or node.layer.inputs is None:
            return node
        codes = node.layer.inputs
        zero_point = (codes.rounding.zero_point + codes.rounding.offset).round().clamp(codes.lowest, codes.highest)
        other = codes.rounding._replace(zero_point=zero_point, offset=torch.zeros(1))
        return replace(node, layer=replace(node.layer, inputs=replace(codes, rounding=other)))

    wrong = replace(graph, nodes=tuple(map(rounded, graph.nodes)))
    file = saved(qcdq(wrong, "net"), tmp_path / "net.onnx")
    _, why = checked(net, graph, images, runners={"runtime": runners.onnxruntime(file)})
    assert "agree" in why or "moved" in why


def test_a_bias_in_32_bits_is_seen(tmp_path, monkeypatch):
    """What onnxruntime does to a norm that is folded into a convolution of codes."""
    net, images, graph = traced("lsq")
    exact = folded(graph)

    def coarse(node):
        layer = node.layer
        if layer is None or not layer.whole or layer.bias is None:
            return node
        steps = layer.multiplier.abs()  # a whole number of steps: the bias of a sum of codes
        return replace(node, layer=replace(layer, bias=(layer.bias / steps).round() * steps))

    wrong = replace(exact, nodes=tuple(map(coarse, exact.nodes)))
    file = saved(integer(wrong, "net"), tmp_path / "net.onnx")
    run = runners.onnxruntime_codes(file)
    found, why = checked(net, graph, images, code_runners={"runtime": run})
    assert found.other_codes > 0
    assert why.endswith("codes differ")


def test_codes_that_are_missing_are_seen(tmp_path):
    net, images, graph = traced("linear")
    file = saved(integer(folded(graph), "net"), tmp_path / "net.onnx")
    own = runners.onnxruntime_codes(file)

    def without_one(images):
        logits, codes = own(images)
        return logits, dict(list(codes.items())[1:])

    found, why = checked(net, graph, images, code_runners={"runtime": without_one})
    assert found.other_codes > 0
    assert why


def test_equal_constants_are_stored_once_and_wrong_graphs_refused(tmp_path):
    made = OnnxGraph("net")
    x = made.input("x", ("batch", 2))
    one, other = made.constant(np.float32(2)), made.constant(np.float32(2), "another name")
    assert one == other != made.constant(np.float32(3))
    made.output(made.node("Mul", x, one, name="y"), ("batch", 2))
    (tmp_path / "net.onnx").write_bytes(made.data({"a": "b"}))
    model = onnx.load(str(tmp_path / "net.onnx"))
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("a", "b")]
    wrong = OnnxGraph("net")
    wrong.output(wrong.node("NoSuchOperation", wrong.input("x", (1,)), name="y"), (1,))
    with pytest.raises(UserError, match="the ONNX file of net would be wrong"):
        wrong.data({})
    assert not (tmp_path / "wrong.onnx").exists()


def test_a_file_that_no_runtime_loads_is_one_line(tmp_path):
    file = tmp_path / "net.onnx"
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="onnxruntime cannot load the file"):
        runners.onnxruntime(file)
    if pytest.importorskip("openvino"):
        with pytest.raises(UserError, match="OpenVINO cannot load the file"):
            runners.openvino(file)


def test_float_layers_are_summed_in_float64(tmp_path):
    """A float convolution with stride and padding, and a depthwise one, against torch in float64."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False)
    ).eval()
    x = torch.randn(2, 3, 9, 11)
    graph = folded(trace(net, (3, 9, 11)))
    made = OnnxGraph("net")
    from export.graph import IMAGE
    from export.integer_file import _layer
    from export.operations import OPERATIONS

    names = {IMAGE: made.input(IMAGE, ("batch", 3, 9, 11))}
    for node in graph.nodes:
        value = names[node.inputs[0]]
        if node.layer is None:
            names[node.name] = OPERATIONS[node.op].emit(made, {}, value)
        else:
            names[node.name] = _layer(made, node, value, graph.shape_of(node.inputs[0]))
    onnx_file.finish(made, graph, names)
    logits = runners.onnxruntime(saved(made, tmp_path / "net.onnx"))(x)
    assert torch.equal(logits, run_exactly(graph, x))
    with torch.no_grad():
        assert (logits.double() - net.double()(x.double())).abs().max() < 1e-6
