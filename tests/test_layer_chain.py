"""Layers as they run on this machine: every runtime computes the layer that is timed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional as f

from apq.genes import largest_subnet
from apq.layers import ConvLayer, layers_of
from apq.presets import DIGITS, QFA_MBV3_GLYPHS
from lut.layer_chain import STEP, image_of, numbers_of, onnx_chain
from lut.runtimes import RUNTIMES, runtime_named

LAYERS = [
    ConvLayer(8, 16, 16, 1, 1, 1, 8, 8),
    ConvLayer(16, 16, 16, 5, 2, 16, 4, 6),
    ConvLayer(3, 16, 15, 3, 2, 1, 8, 8),
    ConvLayer(12, 18, 7, 7, 1, 3, 2, 2),
    ConvLayer(40, 10, 1, 1, 1, 1, 8, 8, linear=True),
]


pytestmark = pytest.mark.usefixtures("torch_threads")


def sums_of(layer, image):
    """(1, out, side, side) float64: bias + convolution of integers, by torch, which are exact."""
    weights, bias, _ = numbers_of(layer)
    arrays = (torch.from_numpy(np.asarray(array, dtype=np.float64)) for array in (image, weights, bias))
    return f.conv2d(*arrays, layer.stride, layer.kernel_size // 2, 1, layer.groups)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_of_8_bits_is_the_right_convolution_of_integers(layer, runtime):
    layer = replace(layer, w_bits=8, a_bits=8)
    codes = image_of([layer])
    expected = (sums_of(layer, codes) * numbers_of(layer).step).relu().round().clamp(max=255)  # halves to even
    found = runtime_named(runtime).prepare([layer], 1)()
    assert found.dtype == np.uint8
    assert expected.unique().numel() > 3
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_of_few_bits_is_as_it_is_exported(layer, runtime):
    """Rounded to 16 codes, in real numbers, with a norm behind it."""
    layer = replace(layer, w_bits=4, a_bits=4)
    image = image_of([layer])
    codes = np.clip(np.round(image / STEP), 0, 15)
    assert (image / STEP).max() > 15
    expected = (sums_of(layer, codes) * (numbers_of(layer).step * STEP)).relu()
    np.testing.assert_allclose(runtime_named(runtime).prepare([layer], 1)(), expected.numpy(), rtol=1e-4, atol=1e-5)
    kinds = [node.op_type for node in onnx_chain([layer]).graph.node]
    assert kinds == [
        *("QuantizeLinear", "Clip", "DequantizeLinear", "DequantizeLinear", "Conv", "BatchNormalization", "Relu")
    ]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_in_full_precision_is_the_right_convolution(layer, runtime):
    layer = replace(layer, w_bits=32, a_bits=32)
    image = image_of([layer])
    assert image.dtype == np.float32
    expected = (sums_of(layer, image / STEP) * (numbers_of(layer).step * STEP)).relu()
    np.testing.assert_allclose(runtime_named(runtime).prepare([layer], 1)(), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_onnxruntime_fuses_a_layer_to_one_integer_convolution(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    for layer in (replace(layer, w_bits=8, a_bits=8) for layer in LAYERS):
        onnxruntime.InferenceSession(onnx_chain([layer]).SerializeToString(), options)
        fused = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        assert [op for op in fused if op != "Transpose"] == ["QLinearConv"]


def test_a_chain_is_its_layers_one_after_the_other():
    first, second = (replace(layer, w_bits=8, a_bits=8) for layer in LAYERS[:2])
    codes = image_of([first])
    for layer in (first, second):
        codes = (sums_of(layer, codes) * numbers_of(layer).step).relu().round().clamp(max=255)
    for runtime in ("onnxruntime", "openvino"):
        np.testing.assert_array_equal(runtime_named(runtime).prepare([first, second], 1)(), codes.numpy())


@pytest.mark.parametrize("space", [DIGITS, QFA_MBV3_GLYPHS], ids=lambda space: space.name)
def test_whole_networks_run_with_pooling_and_gates(space):
    layers = layers_of(space, largest_subnet(space))
    floats = [replace(layer, w_bits=32, a_bits=32) for layer in layers]
    outputs = [runtime.prepare(floats, 1)() for runtime in RUNTIMES.values()]
    assert outputs[0].shape == (1, space.n_classes, 1, 1)
    assert outputs[0].any()
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], rtol=1e-3, atol=1e-4)
    integers = [layer if layer.w_bits == 32 else replace(layer, w_bits=8, a_bits=8) for layer in layers]
    codes = [RUNTIMES[name].prepare(integers, 1)() for name in ("onnxruntime", "openvino")]
    assert codes[0].shape == (1, space.n_classes, 1, 1)
    # Two runtimes may round a sum in a gate apart, by a code.
    assert np.abs(codes[0].astype(int) - codes[1]).max() <= 2
