"""Writes a graph as ONNX with fake-quantized floats: QCDQ (QuantizeLinear, Clip, DequantizeLinear), or QONNX's Quant.

BatchNorm stays a node, and layers with codes get no bias of their own: runtimes that fold a norm or a bias into an
8-bit convolution round the bias to whole steps of 32 bits, which few-bit networks do not survive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from apq.errors import UserError
from apq.onnx_graph import BATCH, OPSET, OPSET_INT2, OnnxGraph
from export.frozen import Codes, FrozenLayer, Weights
from export.graph import IMAGE, Graph, Node
from export.operations import OPERATIONS
from export.run import weights_inside

LOGITS = "logits"  # the name of the output
QONNX_DOMAIN = "qonnx.custom_op.general"
# Below 0.00255 of a code: OpenVINO leaves out a shift of less than 1e-5 of its 255 steps where it rounds.
SMALL_OFFSET = 0.01


@dataclass(frozen=True)
class Style:
    """How a form of ONNX writes rounded inputs and weights.

    Attributes:
        inputs: (graph, codes, name) -> name of the rounded values.
        weights: (graph, name of the layer, weights) -> name of the weights' values.
    """

    inputs: Callable[[OnnxGraph, Codes, str], str]
    weights: Callable[[OnnxGraph, str, Weights], str]


def qcdq(graph: Graph, name: str, *, packed: bool = False) -> OnnxGraph:
    """The graph, as traced, in QCDQ. Weights are 8-bit integers, or with `packed` of 4 or 2 bits where they fit."""
    opset = OPSET_INT2 if packed and needs_int2(graph) else OPSET
    weights = _packed_weights if packed else _int8_weights
    return write(without_idle_clips(graph), OnnxGraph(name, opset), Style(_quantize_dequantize, weights))


def needs_int2(graph: Graph) -> bool:
    """Whether packed weights take 2-bit integers."""
    return any(_bits_of(layer.weights) <= 2 for layer in graph.layers.values())


def qonnx(graph: Graph, name: str) -> OnnxGraph:
    """The graph, as traced, with QONNX's Quant nodes. UserError for k-means, and for inputs with an offset."""
    for layer_name, layer in graph.layers.items():
        if layer.weights.centroids is not None:
            raise UserError(f"QONNX has no k-means: layer {layer_name} has centroids; onnx and packed hold them")
        if layer.inputs is not None and layer.inputs.offset:
            raise UserError(
                f"QONNX has whole zero points only, but the inputs of {layer_name} have an offset, as BatchQuant "
                "learns; leave the format qonnx out"
            )
    made = OnnxGraph(name, OPSET, {QONNX_DOMAIN: 1})
    return write(graph, made, Style(_quant_inputs, _quant_weights))


def write(graph: Graph, made: OnnxGraph, style: Style) -> OnnxGraph:
    """Write the nodes of a graph, for batches of any size."""
    names = {IMAGE: made.input(IMAGE, (BATCH, *graph.image_shape))}
    for node in graph.nodes:
        inputs = [names[name] for name in node.inputs]
        if node.layer is not None:
            names[node.name] = _layer(made, style, node, *inputs, graph.shape_of(node.inputs[0])[1:])
        elif node.norm is not None:
            names[node.name] = _norm(made, node, *inputs)
        else:
            names[node.name] = OPERATIONS[node.op].plain(made, settings_of(node), *inputs)
    finish(made, graph, names)
    return made


def finish(made: OnnxGraph, graph: Graph, names: Mapping[str, str]) -> None:
    """Make the last value the output, under the name of logits."""
    made.node("Identity", names[graph.output.name], name=LOGITS)
    made.output(LOGITS, (BATCH, *graph.output.shape))


def settings_of(node: Node) -> dict[str, Any]:
    """The settings of an operation, with the number of dimensions of its value."""
    return {**node.settings, "ndim": len(node.shape) + 1}


def without_idle_clips(graph: Graph) -> Graph:
    """The graph without ReLU and ReLU6 whose values are only read by inputs that clip as much or more."""
    users, new_name, nodes = graph.users(), {}, []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(new_name.get(name, name) for name in node.inputs))
        ends = {"relu": np.inf, "relu6": 6.0}
        read_by = users[node.name]
        if node.op in ends and read_by and all(_clips_within(user.layer, ends[node.op]) for user in read_by):
            new_name[node.name] = node.inputs[0]
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _clips_within(layer: FrozenLayer | None, end: float) -> bool:
    """Whether the inputs of a layer are clipped to a range from 0 to at most `end`."""
    codes = None if layer is None else layer.inputs
    if codes is None or codes.lowest or codes.zero_point or codes.offset:
        return False
    return codes.step * codes.highest <= end


def _layer(made: OnnxGraph, style: Style, node: Node, x: str, sides: tuple[int, ...]) -> str:
    layer = node.layer
    if layer.inputs is not None:
        x = style.inputs(made, layer.inputs, x)
    weights = style.weights(made, node.name, layer.weights)
    # A MatMul would become MatMulNBits in onnxruntime, which rounds its inputs once more.
    product = (
        made.node("Gemm", x, weights, transB=1) if layer.linear else made.node("Conv", x, weights, **geometry(layer))
    )
    added = _added(layer, sides)
    return product if added is None else made.node("Add", product, made.constant(added, f"{node.name}.bias"))


def _added(layer: FrozenLayer, sides: tuple[int, ...]) -> np.ndarray | None:
    """What a layer adds to its products: the bias, less what the offset of the inputs has added. None for nothing."""
    offset = 0 if layer.inputs is None else layer.inputs.offset * layer.inputs.step
    if layer.bias is None and not offset:
        return None
    added = torch.zeros(1, dtype=torch.float64) if layer.bias is None else layer.bias.double()
    added = added.view((1, -1) if layer.linear else (1, -1, 1, 1))
    if offset:
        added = added - offset * weights_inside(layer, layer.weights.values(), sides)
    return added.float().numpy()


def geometry(layer: FrozenLayer) -> dict[str, Any]:
    """The attributes of a convolution, all of them: runtimes differ in what they assume."""
    return {
        "kernel_shape": list(layer.weights.codes.shape[2:]),
        "strides": list(layer.stride),
        "pads": list(layer.pads),
        "dilations": list(layer.dilation),
        "group": layer.groups,
    }


def _norm(made: OnnxGraph, node: Node, x: str) -> str:
    norm = node.norm
    parts = {"weight": norm.weight, "bias": norm.bias, "mean": norm.mean, "variance": norm.variance}
    constants = (made.constant(value.numpy(), f"{node.name}.{part}") for part, value in parts.items())
    return made.node("BatchNormalization", x, *constants, epsilon=norm.eps)


def _quantize_dequantize(made: OnnxGraph, codes: Codes, x: str) -> str:
    """Inputs as codes and back. An offset is added before, never rounded away; what it adds is taken off after the
    layer, because OpenVINO would round it if it were taken off here."""
    kind = np.int8 if codes.signed else np.uint8
    step, zero_point = (
        made.constant(np.float32(codes.step), "step"),
        made.constant(kind(codes.zero_point), "zero_point"),
    )
    if codes.offset:
        x = made.node("Add", x, made.constant(np.float32(codes.offset * codes.step), "offset"))
        if abs(codes.zero_point + codes.offset) < SMALL_OFFSET:
            # Changes nothing, but keeps OpenVINO from taking the addition into its rounding.
            below = np.float32((codes.lowest - codes.zero_point - 1) * codes.step)
            x = made.node("Max", x, made.constant(below, "below"))
    x = clipped(made, codes, made.node("QuantizeLinear", x, step, zero_point))
    return made.node("DequantizeLinear", x, step, zero_point)


def clipped(made: OnnxGraph, codes: Codes, x: str) -> str:
    """Codes in 8-bit integers, cut to the range of their bits where that is smaller."""
    kind = np.int8 if codes.signed else np.uint8
    if (codes.lowest, codes.highest) == (np.iinfo(kind).min, np.iinfo(kind).max):
        return x
    edges = (made.constant(kind(edge), "edge") for edge in (codes.lowest, codes.highest))
    return made.node("Clip", x, *edges)


def _int8_weights(made: OnnxGraph, name: str, weights: Weights) -> str:
    return _stored_weights(made, name, weights, None)


def _packed_weights(made: OnnxGraph, name: str, weights: Weights) -> str:
    bits = _bits_of(weights)
    return _stored_weights(made, name, weights, None if bits > 4 else "int4" if bits > 2 else "int2")


def _bits_of(weights: Weights) -> int:
    """The bits that the codes of weights need in two's complement; 8 and more for others."""
    if not weights.whole:
        return 32
    lowest, highest = int(weights.codes.min()), int(weights.codes.max())
    return next(bits for bits in range(1, 64) if -(2 ** (bits - 1)) <= lowest and highest < 2 ** (bits - 1))


def _stored_weights(made: OnnxGraph, name: str, weights: Weights, kind: str | None) -> str:
    """Weights as integers with a DequantizeLinear behind them, as labels of centroids, or as floats."""
    array = weights.codes.numpy()
    if weights.centroids is not None:
        labels = made.constant(array.astype(np.uint8), f"{name}.labels")
        labels = made.node("Cast", labels, to=made.onnx.TensorProto.INT32)
        return made.node("Gather", made.constant(weights.centroids.numpy(), f"{name}.centroids"), labels, axis=0)
    if not weights.whole:
        return made.constant(array, f"{name}.weight")
    codes = made.constant(array.astype(np.int8), f"{name}.weight", kind)
    return made.node("DequantizeLinear", codes, made.constant(weights.step.numpy()[0], f"{name}.weight.step"))


def _quant(made: OnnxGraph, x: str, step: float, zero_point: int, bits: int, *, signed: bool, narrow: bool) -> str:
    facts = (np.float32(step), np.float32(zero_point), np.float32(bits))
    constants = (made.constant(fact, "quant") for fact in facts)
    attributes = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
    return made.node("Quant", x, *constants, domain=QONNX_DOMAIN, **attributes)


def _quant_inputs(made: OnnxGraph, codes: Codes, x: str) -> str:
    narrow = codes.signed and codes.lowest == -codes.highest
    return _quant(made, x, codes.step, codes.zero_point, codes.bits, signed=codes.signed, narrow=narrow)


def _quant_weights(made: OnnxGraph, name: str, weights: Weights) -> str:
    values = made.constant(weights.values().numpy(), f"{name}.weight")
    if not weights.whole:
        return values
    narrow = weights.codes.min() > -(2 ** (weights.bits - 1))
    return _quant(made, values, weights.step.item(), 0, weights.bits, signed=True, narrow=bool(narrow))
