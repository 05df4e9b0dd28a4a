"""Runs exported files in the programs that they are for. Each gives a function from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apq.errors import UserError
from apq.extras import extra
from export.graph import IMAGE
from export.integer_file import CODES
from export.onnx_file import LOGITS
from export.packed import read_packed
from export.run import run_exactly

Runner = Callable[[Tensor], Tensor]  # (N, C, H, W) images -> (N, classes) logits
CodesRunner = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # the same with the codes of each layer's inputs


def onnxruntime(file: Path | bytes, *, optimized: bool = True) -> Runner:
    """An ONNX file in onnxruntime on the CPU, with its default options or with no optimizations."""
    session = _session(file, optimized)
    return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGE: images.numpy()})[0])


def onnxruntime_codes(file: Path, *, optimized: bool = True) -> CodesRunner:
    """A file of whole numbers in onnxruntime, which also gives all its codes."""
    onnx = extra("onnx", "export")
    model = onnx.load(str(file))
    names = [node.output[0] for node in model.graph.node if node.output[0].endswith(CODES)]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = _session(model.SerializeToString(), optimized)

    def run(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, *codes = session.run([LOGITS, *names], {IMAGE: images.numpy()})
        found = {name.removesuffix(CODES): torch.from_numpy(one) for name, one in zip(names, codes, strict=True)}
        return torch.from_numpy(logits), found

    return run


def _session(file: Path | bytes, optimized: bool) -> object:
    runtime = extra("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return runtime.InferenceSession(
            file if isinstance(file, bytes) else str(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise UserError(f"onnxruntime cannot load the file: {_first_line(error)}") from error


def openvino(file: Path) -> Runner:
    """An ONNX file in OpenVINO on the CPU. What it leaves in floats it computes in float32, not in bfloat16."""
    library = extra("openvino", "export-check")
    core = library.Core()
    try:
        compiled = core.compile_model(core.read_model(str(file)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot load {file}: {_first_line(error)}") from error
    return lambda images: torch.from_numpy(np.array(compiled(images.numpy())[0]))


def qonnx(file: Path) -> Runner:
    """A QONNX file in QONNX's own executor, node by node."""
    wrapper = extra("qonnx.core.modelwrapper", "export-check").ModelWrapper
    execute = extra("qonnx.core.onnx_exec", "export-check").execute_onnx
    infer = extra("qonnx.transformation.infer_shapes", "export-check").InferShapes

    def run(images: Tensor) -> Tensor:
        model = wrapper(str(file))
        model.set_tensor_shape(IMAGE, list(images.shape))  # the executor needs a fixed batch
        model.set_tensor_shape(LOGITS, [len(images), *model.get_tensor_shape(LOGITS)[1:]])
        return torch.from_numpy(execute(model.transform(infer()), {IMAGE: images.numpy()})[LOGITS])

    return run


def packed(file: Path) -> Runner:
    """A packed file, read back and computed with whole numbers in torch."""
    graph = read_packed(file)
    return lambda images: run_exactly(graph, images)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
