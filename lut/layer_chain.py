"""Layers one after the other as an ONNX network, of which runtimes measure the time.

A layer of 8 bits computes with 8-bit integers: its weights are stored so, and its input and output are quantized around
it (QDQ), which runtimes fuse into one integer convolution. A layer of fewer bits is as `export.py` writes it: its input
is rounded to few codes and back, and BatchNorm follows. Other layers compute in floating point. Weights are random:
times do not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from apq.layers import ConvLayer
from apq.onnx_graph import OnnxGraph

INTEGER_BITS = 8  # the fewest bits that runtimes for CPUs compute with
STEP = 2.0**-6  # between codes of activations: a power of two, so that few numbers are rounded
MOST_WEIGHT = 63  # then the sum of two products has 16 bits, which processors without VNNI saturate
MOST_BIAS = 1000
REDUCE = "squeeze.reduce"  # ends the name of the layer that begins squeeze-and-excitation
EXCITE = "squeeze.excite"


class LayerNumbers(NamedTuple):
    """The numbers in a layer of a chain. Real weights are `weights * step`, real biases `bias * step * STEP`."""

    weights: np.ndarray  # (out, in / groups, kernel, kernel) int8
    bias: np.ndarray  # (out,) int32
    step: float


@dataclass(frozen=True)
class _Value:
    """A feature map in the graph: codes of 8 bits if `codes`, else real numbers."""

    name: str
    channels: int
    side: int
    codes: bool


def is_quantized(layer: ConvLayer) -> bool:
    """Whether weights and activations have at most 8 bits."""
    return max(layer.w_bits, layer.a_bits) <= INTEGER_BITS


def is_integer(layer: ConvLayer) -> bool:
    """Whether the layer computes with integers: weights and activations have 8 bits."""
    return layer.w_bits == layer.a_bits == INTEGER_BITS


def numbers_of(layer: ConvLayer) -> LayerNumbers:
    """Random weights and biases, the same at every call. Outputs have about the range of inputs."""
    rng = np.random.default_rng(0)
    shape = (layer.out_channels, layer.in_channels // layer.groups, layer.kernel_size, layer.kernel_size)
    weights = rng.integers(-MOST_WEIGHT, MOST_WEIGHT, shape, np.int8, endpoint=True)
    bias = rng.integers(-MOST_BIAS, MOST_BIAS, layer.out_channels, np.int32, endpoint=True)
    spread = MOST_WEIGHT * math.sqrt(2 * math.prod(shape[1:]) / 3)  # of sums of weights, x sqrt(2) for ReLU
    return LayerNumbers(weights, bias, 2.0 ** -math.ceil(math.log2(spread)))


def image_of(layers: Sequence[ConvLayer]) -> np.ndarray:
    """(1, channels, side, side) random input of a chain: uint8 codes of its first layer, or float32."""
    shape = (1, layers[0].in_channels, layers[0].input_size, layers[0].input_size) if layers else (1, 1, 1, 1)
    codes = np.random.default_rng(1).integers(0, 255, shape, np.uint8, endpoint=True)
    return codes if not layers or is_integer(layers[0]) else codes.astype(np.float32) * np.float32(STEP)


def kinds_of(layers: Sequence[ConvLayer]) -> list[tuple[ConvLayer, bool, bool]]:
    """Each layer of a chain, and whether average pooling and whether a shortcut for a gate come before it.

    Squeeze-and-excitation pools and gates the feature map before it; another layer on 1x1 pixels pools what is larger.
    """
    rows, side = [], 0
    for layer in layers:
        reduces = layer.name.endswith(REDUCE)
        pools = layer.input_size == 1 and side > 1 and not layer.name.endswith(EXCITE)
        rows.append((layer, pools and not reduces, reduces))
        if not layer.name.endswith((REDUCE, EXCITE)):
            side = layer.output_size
    return rows


def onnx_chain(layers: Sequence[ConvLayer]) -> Any:
    """The ONNX model of a chain: convolution, bias and ReLU of each layer, without shortcuts.

    Input and output are codes where the layer there computes with integers, so that a single layer is that layer
    alone. The chain of no layers returns its input: its time is that of a call. UserError where onnx is missing.
    """
    graph, image = OnnxGraph("layers"), image_of(layers)
    name = graph.input("image", image.shape, image.dtype.name.replace("32", ""))
    value, gated = _Value(name, image.shape[1], image.shape[2], image.dtype == np.uint8), None
    if not layers:
        value = _Value(graph.node("Identity", name), 1, 1, codes=True)
    for layer, pools, begins_gate in kinds_of(layers):
        if begins_gate:
            gated = value
        if pools or begins_gate:
            value = _pooled(graph, value)
        value = _convolved(graph, value, layer)
        if layer.name.endswith(EXCITE) and gated is not None:
            value, gated = _gate(graph, gated, value), None
    graph.output(value.name, (1, value.channels, value.side, value.side), "uint8" if value.codes else "float")
    return graph.model({})


def _convolved(graph: OnnxGraph, value: _Value, layer: ConvLayer) -> _Value:
    """The layer's output: codes of a layer that computes with integers, else real numbers."""
    if is_quantized(layer) and not is_integer(layer):
        return _as_exported(graph, value, layer)
    weights, bias, step = numbers_of(layer)
    if is_integer(layer):
        steps = np.full(layer.out_channels, step, np.float32)  # one a channel, as with a folded BatchNorm
        inputs = (
            _real(graph, value if value.codes else _quantized(graph, value)),
            graph.node("DequantizeLinear", graph.constant(weights), graph.constant(steps), axis=0),
            graph.node("DequantizeLinear", graph.constant(bias), graph.constant(steps * np.float32(STEP)), axis=0),
        )
    else:
        real = weights * np.float32(step), bias * np.float32(step * STEP)
        inputs = (_real(graph, value), *(graph.constant(array.astype(np.float32)) for array in real))
    sums = graph.node("Conv", *inputs, **_geometry(layer))
    if layer.name.endswith(EXCITE):
        return _Value(graph.node("Sigmoid", sums), layer.out_channels, layer.output_size, codes=False)
    output = _Value(graph.node("Relu", sums), layer.out_channels, layer.output_size, codes=False)
    return _quantized(graph, output) if is_integer(layer) else output


def _as_exported(graph: OnnxGraph, value: _Value, layer: ConvLayer) -> _Value:
    """The layer as `export.py` writes it: real numbers of few codes, and a norm (here one that adds the bias)."""
    weights, bias, step = numbers_of(layer)
    codes = graph.node("QuantizeLinear", _real(graph, value), *_scale(graph))
    edges = (graph.constant(np.uint8(edge)) for edge in (0, 2**layer.a_bits - 1))
    x = graph.node("DequantizeLinear", graph.node("Clip", codes, *edges), *_scale(graph))
    w = graph.node("DequantizeLinear", graph.constant(weights), graph.constant(np.float32(step)))
    one, zero = np.ones(layer.out_channels, np.float32), np.zeros(layer.out_channels, np.float32)
    norm = (graph.constant(array) for array in (one, (bias * (step * STEP)).astype(np.float32), zero, one))
    sums = graph.node("BatchNormalization", graph.node("Conv", x, w, **_geometry(layer)), *norm, epsilon=0.0)
    return _Value(graph.node("Relu", sums), layer.out_channels, layer.output_size, codes=False)


def _geometry(layer: ConvLayer) -> dict[str, Any]:
    return {
        "kernel_shape": [layer.kernel_size] * 2,
        "strides": [layer.stride] * 2,
        "pads": [layer.kernel_size // 2] * 4,
        "dilations": [1, 1],
        "group": layer.groups,
    }


def _pooled(graph: OnnxGraph, value: _Value) -> _Value:
    pooled = _Value(graph.node("GlobalAveragePool", _real(graph, value)), value.channels, 1, codes=False)
    return _quantized(graph, pooled) if value.codes else pooled


def _gate(graph: OnnxGraph, value: _Value, gate: _Value) -> _Value:
    product = graph.node("Mul", _real(graph, value), _real(graph, gate))
    return _Value(product, value.channels, value.side, codes=False)


def _quantized(graph: OnnxGraph, value: _Value) -> _Value:
    codes = graph.node("QuantizeLinear", value.name, *_scale(graph))
    return _Value(codes, value.channels, value.side, codes=True)


def _real(graph: OnnxGraph, value: _Value) -> str:
    return graph.node("DequantizeLinear", value.name, *_scale(graph)) if value.codes else value.name


def _scale(graph: OnnxGraph) -> tuple[str, str]:
    return graph.constant(np.float32(STEP)), graph.constant(np.uint8(0))
