"""Writes a folded graph as ONNX with whole numbers: ConvInteger, then a multiplier and a bias for each channel.

Every value that is not a whole number comes from operations that are rounded once, in one order, so that a runtime has
the codes of `run_exactly`, all of them.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from apq.errors import UserError
from apq.onnx_graph import BATCH, OnnxGraph
from export.frozen import Codes, FrozenLayer
from export.graph import IMAGE, Graph, Node
from export.onnx_file import clipped, finish, geometry, settings_of
from export.operations import OPERATIONS, in_double, pad
from export.run import constants

CODES = ".codes"  # ends the names of the codes of a layer's inputs
LARGEST_INT32 = 2**31 - 1


def integer(graph: Graph, name: str) -> OnnxGraph:
    """The folded graph with whole numbers. UserError where no layer has them, or where 32 bits cannot hold a sum."""
    for layer_name, layer in graph.layers.items():
        if layer.weights.centroids is not None:
            raise UserError(f"k-means has no whole numbers: {layer_name} has centroids; onnx and packed hold them")
    if not any(layer.whole for layer in graph.layers.values()):
        raise UserError("no layer has codes of both inputs and weights: leave the format onnx-integer out")
    made = OnnxGraph(name)
    names = {IMAGE: made.input(IMAGE, (BATCH, *graph.image_shape))}
    for node in graph.nodes:
        inputs = [names[name] for name in node.inputs]
        if node.layer is None:
            names[node.name] = OPERATIONS[node.op].emit(made, settings_of(node), *inputs)
        else:
            names[node.name] = _layer(made, node, inputs[0], graph.shape_of(node.inputs[0]))
    finish(made, graph, names)
    return made


def _layer(made: OnnxGraph, node: Node, x: str, shape: tuple[int, ...]) -> str:
    layer = node.layer
    if layer.inputs is not None:
        x = _codes(made, layer.inputs, x, node.name + CODES)
    sums = _whole_sums(made, node, x) if layer.whole else _float_sums(made, node, x, shape)
    multiplier, bias = constants(layer, shape[1:])
    scaled = made.node("Mul", sums, made.constant(multiplier.numpy(), f"{node.name}.multiplier"))
    return scaled if bias is None else made.node("Add", scaled, made.constant(bias.numpy(), f"{node.name}.bias"))


def _codes(made: OnnxGraph, codes: Codes, x: str, name: str) -> str:
    """The codes of values, in 8-bit integers."""
    kind = np.int8 if codes.signed else np.uint8
    step, zero_point, gain, offset = (part.numpy()[0] for part in codes.rounding)
    if zero_point == 0 and gain == 1 and offset == 0:
        x = made.node("QuantizeLinear", x, made.constant(step, "step"), made.constant(kind(0), "zero_point"))
        return made.node("Identity", clipped(made, codes, x), name=name)
    if gain != 1:
        x = made.node("Mul", x, made.constant(gain, "gain"))
    x = made.node("Div", x, made.constant(step, "step"))
    for part in (zero_point, offset):
        if part != 0:
            x = made.node("Add", x, made.constant(part, "shift"))
    edges = (made.constant(np.float32(edge), "edge") for edge in (codes.lowest, codes.highest))
    x = made.node("Round", made.node("Clip", x, *edges))
    return made.node(
        "Cast", x, name=name, to=made.onnx.TensorProto.INT8 if codes.signed else made.onnx.TensorProto.UINT8
    )


def _whole_sums(made: OnnxGraph, node: Node, x: str) -> str:
    """Sums of codes as floats. A fully connected layer is a convolution of one pixel."""
    layer, codes = node.layer, node.layer.inputs
    if layer.largest_sum() > LARGEST_INT32:
        raise UserError(f"the sums of layer {node.name} may need more than 32 bits: leave the format onnx-integer out")
    array = layer.weights.codes.numpy().astype(np.int8)
    pixel = made.constant(np.array([2, 3]), "pixel")
    if layer.linear:
        x, array = made.node("Unsqueeze", x, pixel), array[:, :, None, None]
    zero_point = made.constant((np.int8 if codes.signed else np.uint8)(codes.zero_point), "zero_point")
    weights = made.constant(array, f"{node.name}.weight")
    attributes = geometry(layer) | {"kernel_shape": list(array.shape[2:])}
    sums = made.node("ConvInteger", x, weights, zero_point, name=f"{node.name}.sums", **attributes)
    sums = made.node("Cast", sums, to=made.onnx.TensorProto.FLOAT)
    return made.node("Squeeze", sums, pixel) if layer.linear else sums


def _float_sums(made: OnnxGraph, node: Node, x: str, shape: tuple[int, ...]) -> str:
    """Sums of products in float64, where inputs or weights have no codes."""
    layer = node.layer
    if layer.inputs is not None:
        raise UserError(f"layer {node.name} rounds its inputs but not its weights: leave the format onnx-integer out")
    weights = layer.weights.codes if layer.weights.whole else layer.weights.values()
    array = weights.double().numpy()
    if layer.linear:
        return in_double(made, x, lambda double: made.node("MatMul", double, made.constant(array.T.copy(), "weight")))
    if layer.groups not in (1, len(array)) or layer.dilation != (1, 1):
        raise UserError(f"layer {node.name} has groups without codes: leave the format onnx-integer out")
    return in_double(made, x, lambda double: _convolve(made, layer, array, double, node.shape))


def _convolve(made: OnnxGraph, layer: FrozenLayer, array: np.ndarray, x: str, shape: tuple[int, ...]) -> str:
    """A convolution in float64, for which runtimes have no convolution: a product for all places of the kernel."""
    down, right = layer.stride
    channels, height, width = shape
    if any(layer.pads):
        x = pad(made, {"pads": layer.pads}, x)
    axes, steps = made.constant(np.array([2, 3]), "axes"), made.constant(np.array([down, right]), "steps")
    places = []
    for i, j in product(range(array.shape[2]), range(array.shape[3])):
        first = np.array([i, j])
        last = first + np.array([down * (height - 1) + 1, right * (width - 1) + 1])
        part = made.node("Slice", x, made.constant(first, "starts"), made.constant(last, "ends"), axes, steps)
        if layer.groups > 1:  # one filter a channel
            part = made.node("Mul", part, made.constant(array[:, 0, i, j][:, None, None].copy(), "weight"))
        places.append(part)
    if layer.groups > 1:
        return made.node("Sum", *places)
    columns = made.node("Concat", *places, axis=1)
    columns = made.node("Reshape", columns, made.constant(np.array([0, -1, height * width]), "shape"))
    matrix = array.transpose(0, 2, 3, 1).reshape(channels, -1)
    sums = made.node("MatMul", made.constant(matrix, "weight"), columns)
    return made.node("Reshape", sums, made.constant(np.array([0, channels, height, width]), "shape"))
