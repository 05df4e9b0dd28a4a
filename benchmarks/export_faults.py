"""What other ways of writing the same network do to it: the mistakes that export.py avoids, each in a file.

  norms folded      BatchNorm in the weights' steps and in a float bias of the convolution
  offset rounded    BatchQuant's fractional offset rounded into the zero point
  offset inside     the offset taken off between DequantizeLinear and the convolution
  MatMul            fully connected layers as MatMul, and the offset inside
  no clips          codes of few bits without a Clip

"As exported" is the file of export.py. Each is compared with the network on test images.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from apq.cli import Parser, at_least, run
from apq.errors import UserError
from apq.experiment import Experiment
from apq.onnx_graph import OnnxGraph
from benchmarks.machine import describe
from benchmarks.markdown import markdown
from dataset.splits import make_loader
from elastic_nn.training.experiment_network import load_subnet_and_images
from export import onnx_file, runners
from export.checking import compare
from export.frozen import Codes
from export.graph import Graph, Node, folded
from export.trace import trace

BATCH = 250


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--exp_dirs", type=Path, nargs="+", required=True, help="folders of experiments of subnets")
    parser.add_argument("--images", type=at_least(1), default=2000, help="test images, evenly spaced")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    print(describe(), "\n")
    rows = [row for folder in args.exp_dirs for row in compared(folder, args.images)]
    print(markdown(("experiment", "written", "runtime", "agree", "moved", "top-1", "network's"), rows))


def compared(folder: Path, n_images: int) -> Iterator[tuple[str, ...]]:
    """Rows of one experiment."""
    (net, _, subnet, _), splits = load_subnet_and_images(Experiment(folder), None, None, torch.device("cpu"))
    net.eval()
    side = subnet.resolution
    graph = trace(net, (next(iter(splits.test))[0].size(0), side, side))
    for name, write in WAYS.items():
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "model.onnx"
            try:
                file.write_bytes(write(graph).data({}))
            except UserError as error:
                yield (str(folder), name, str(error), "", "", "", "")
                continue
            for runtime, open_file in (("onnxruntime", runners.onnxruntime), ("OpenVINO, float32", runners.openvino)):
                batches = make_loader(splits.test.thinned(n_images), BATCH, sides=(side,))
                try:
                    (found,) = compare(net, None, batches, {runtime: open_file(file)}, {}).files
                except UserError as error:
                    yield (str(folder), name, runtime, str(error)[:60], "", "", "")
                    continue
                counts = (found.agreed, found.moved, found.right, found.right_network)
                yield (str(folder), name, runtime, *(f"{found.share(count):.2%}" for count in counts))


def with_folded_norms(graph: Graph) -> OnnxGraph:
    """Norms in the steps of weights, one a channel, and in a bias of the convolution."""
    if any(layer.inputs is not None and layer.inputs.offset for layer in graph.layers.values()):
        raise UserError("a bias has one number a channel, offsets need one a place")

    def layer(made: OnnxGraph, style: onnx_file.Style, node: Node, x: str, sides: tuple[int, ...]) -> str:
        own = node.layer
        if not own.whole or own.linear or own.bias is None:
            return _scaled(made, style, node, x)
        step, sign = own.multiplier.abs() / own.inputs.step, own.multiplier.sign()
        codes = own.weights.codes * sign.view(-1, 1, 1, 1).long()  # a step is never negative
        codes = made.constant(codes.clamp(-128, 127).numpy().astype(np.int8), f"{node.name}.weight")
        weights = made.node("DequantizeLinear", codes, made.constant(step.numpy(), "steps"), axis=0)
        bias = made.constant(own.bias.numpy(), f"{node.name}.bias")
        return made.node("Conv", style.inputs(made, own.inputs, x), weights, bias, **onnx_file.geometry(own))

    with mock.patch.object(onnx_file, "_layer", layer):
        return onnx_file.qcdq(folded(graph), "net")


def _scaled(made: OnnxGraph, style: onnx_file.Style, node: Node, x: str) -> str:
    """A folded layer that is no convolution of codes: its product, multiplied and added to."""
    own, shape = node.layer, (1, -1) if node.layer.linear else (1, -1, 1, 1)
    bare = replace(node, layer=replace(own, bias=None))
    product = WRITE_LAYER(made, style, bare, x, ())
    steps = 1.0 if own.weights.step is None else own.weights.step
    steps = steps * own.inputs.step if own.whole else steps
    product = made.node("Mul", product, made.constant((own.multiplier / steps).reshape(shape).numpy(), "multiplier"))
    return product if own.bias is None else made.node("Add", product, made.constant(own.bias.view(shape).numpy()))


def with_rounded_offsets(graph: Graph) -> OnnxGraph:
    """Offsets in the zero points."""

    def rounded(node: Node) -> Node:
        if node.layer is None or node.layer.inputs is None:
            return node
        codes, rounding = node.layer.inputs, node.layer.inputs.rounding
        zero_point = (rounding.zero_point + rounding.offset).round().clamp(codes.lowest, codes.highest)
        other = replace(codes, rounding=rounding._replace(zero_point=zero_point, offset=torch.zeros(1)))
        return replace(node, layer=replace(node.layer, inputs=other))

    return onnx_file.qcdq(replace(graph, nodes=tuple(map(rounded, graph.nodes))), "net")


def with_offsets_inside(graph: Graph) -> OnnxGraph:
    """Offsets taken off before the layer."""
    write_codes = onnx_file._quantize_dequantize

    def inside(made: OnnxGraph, codes: Codes, x: str) -> str:
        x = write_codes(made, codes, x)
        return made.node("Sub", x, made.constant(np.float32(codes.offset * codes.step))) if codes.offset else x

    none = mock.patch.object(onnx_file, "weights_inside", return_value=torch.zeros(1).double())
    with none, mock.patch.object(onnx_file, "_quantize_dequantize", inside):
        return onnx_file.qcdq(graph, "net")


def with_matmul(graph: Graph) -> OnnxGraph:
    """MatMul with transposed codes in place of Gemm."""

    def layer(made: OnnxGraph, style: onnx_file.Style, node: Node, x: str, sides: tuple[int, ...]) -> str:
        own = node.layer
        if not own.linear or not own.whole:
            return WRITE_LAYER(made, style, node, x, sides)
        codes = made.constant(own.weights.codes.T.numpy().astype(np.int8).copy(), f"{node.name}.weight")
        weights = made.node("DequantizeLinear", codes, made.constant(own.weights.step.numpy()[0], "step"))
        product = made.node("MatMul", style.inputs(made, own.inputs, x), weights)
        added = onnx_file._added(own, sides)
        return product if added is None else made.node("Add", product, made.constant(added, f"{node.name}.bias"))

    with mock.patch.object(onnx_file, "_layer", layer):
        return with_offsets_inside(graph)


def without_clips(graph: Graph) -> OnnxGraph:
    """Codes up to the ends of 8 bits."""
    with mock.patch.object(onnx_file, "clipped", lambda made, codes, x: x):
        return onnx_file.qcdq(graph, "net")


WRITE_LAYER = onnx_file._layer
WAYS: dict[str, Callable[[Graph], OnnxGraph]] = {
    "as exported": lambda graph: onnx_file.qcdq(graph, "net"),
    "norms folded": with_folded_norms,
    "offset rounded": with_rounded_offsets,
    "offset inside": with_offsets_inside,
    "MatMul": with_matmul,
    "no clips": without_clips,
}


if __name__ == "__main__":
    run(main)
