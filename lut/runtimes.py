"""Runtimes that time layers on this machine's CPU. They are imported on demand.

A runtime from outside is a row in `RUNTIMES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from apq.errors import UserError, one_line
from apq.extras import extra
from apq.layers import ConvLayer
from apq.space import FULL_PRECISION
from lut.layer_chain import EXCITE, INTEGER_BITS, STEP, image_of, kinds_of, numbers_of, onnx_chain

Run = Callable[[], np.ndarray]
Prepare = Callable[[Sequence[ConvLayer], int], Run]
INTEGERS, FLOATS, FEW = (INTEGER_BITS, INTEGER_BITS), (FULL_PRECISION, FULL_PRECISION), (4, 4)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A way to run layers.

    Attributes:
        library: the name under which its package is installed.
        bits: bits of weights and activations that it can be timed at, the first ones by default. A CPU is no faster at
            fewer than 8: 4 stand for all of them, for layers as `export.py` writes them.
        prepare: (layers, threads) -> a function that runs these layers, one after the other, on `image_of(layers)`, and
            returns the output. UserError where the library is not installed.
    """

    library: str
    bits: tuple[tuple[int, int], ...]
    prepare: Prepare

    @property
    def version(self) -> str:
        """The version of the library."""
        return metadata.version(self.library)

    def bits_for(self, wanted: tuple[int, int] | None) -> tuple[int, int]:
        """The bits that are timed. UserError for bits that the runtime does not compute with."""
        if wanted is not None and wanted not in self.bits:
            known = " or ".join(f"{w}x{a}" for w, a in self.bits)
            raise UserError(
                f"{self.library} is timed at {known} bits, not {wanted[0]}x{wanted[1]}; on a CPU all numbers of fewer "
                "than 8 bits cost the same"
            )
        return wanted or self.bits[0]


def runtime_named(name: str) -> Runtime:
    """A runtime of `RUNTIMES`. UserError for an unknown name."""
    if name not in RUNTIMES:
        raise UserError(f"unknown runtime {name!r}; known: {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def onnxruntime_session(model: bytes, threads: int, *, optimized: bool = True) -> Any:
    """An ONNX file in onnxruntime on the CPU, with its default optimizations or as written.

    UserError where onnxruntime cannot load it.
    """
    library = extra("onnxruntime", "export")
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    if not optimized:
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise UserError(f"onnxruntime cannot load the file: {one_line(error)}") from error


def openvino_model(model: bytes, threads: int) -> Any:
    """An ONNX file compiled by OpenVINO for the CPU. UserError where it cannot be compiled."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else some processors compute in bfloat16
    }
    core = _openvino_core()
    try:
        return core.compile_model(core.read_model(model), "CPU", settings)
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot load the file: {one_line(error)}") from error


@functools.cache
def _openvino_core() -> Any:
    return extra("openvino", "export-check").Core()


def _onnxruntime(layers: Sequence[ConvLayer], threads: int) -> Run:
    session = onnxruntime_session(onnx_chain(layers).SerializeToString(), threads)
    images = {session.get_inputs()[0].name: image_of(layers)}
    return lambda: session.run(None, images)[0]


def _openvino(layers: Sequence[ConvLayer], threads: int) -> Run:
    library = extra("openvino", "export-check")
    request = openvino_model(onnx_chain(layers).SerializeToString(), threads).create_infer_request()
    request.set_input_tensor(library.Tensor(image_of(layers)))  # once: a call takes longer than a small layer

    def run() -> np.ndarray:
        return request.infer(share_outputs=True)[0]

    return run


def _torch(layers: Sequence[ConvLayer], threads: int) -> Run:
    import torch
    from torch.nn import functional as f

    torch.set_num_threads(threads)
    image = torch.from_numpy(image_of(layers))
    rows = []
    for layer, pools, begins_gate in kinds_of(layers):
        weights, bias, step = numbers_of(layer)
        real = (torch.from_numpy(weights).float() * step, torch.from_numpy(bias).float() * (step * STEP))
        settings = {"stride": layer.stride, "padding": layer.kernel_size // 2, "groups": layer.groups}
        rows.append((*real, settings, pools, begins_gate, layer.name.endswith(EXCITE)))

    @torch.inference_mode()
    def run() -> np.ndarray:
        x = gated = image
        for weights, bias, settings, pools, begins_gate, excites in rows:
            gated = x if begins_gate else gated
            x = f.adaptive_avg_pool2d(x, 1) if pools or begins_gate else x
            x = f.conv2d(x, weights, bias, **settings)
            x = gated * x.sigmoid() if excites else x.relu_()
        return x.numpy()

    return run


RUNTIMES = {
    "onnxruntime": Runtime(library="onnxruntime", bits=(INTEGERS, FLOATS, FEW), prepare=_onnxruntime),
    "openvino": Runtime(library="openvino", bits=(INTEGERS, FLOATS, FEW), prepare=_openvino),
    # Its quantized tensors are deprecated, so that it is timed in floating point alone.
    "torch": Runtime(library="torch", bits=(FLOATS,), prepare=_torch),
}
