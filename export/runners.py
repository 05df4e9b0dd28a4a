"""Runs exported files in the programs that they are for. Each gives a function from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apq.extras import extra
from export.graph import IMAGE
from export.integer_file import CODES
from export.onnx_file import LOGITS
from export.packed import read_packed
from export.run import run_exactly
from lut.runtimes import onnxruntime_session, openvino_model

Runner = Callable[[Tensor], Tensor]  # (N, C, H, W) images -> (N, classes) logits
CodesRunner = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # the same with the codes of each layer's inputs


def onnxruntime(file: Path, *, optimized: bool = True) -> Runner:
    """An ONNX file in onnxruntime on the CPU, with its default options or with no optimizations."""
    session = onnxruntime_session(file.read_bytes(), torch.get_num_threads(), optimized=optimized)
    return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGE: images.numpy()})[0])


def onnxruntime_codes(file: Path, *, optimized: bool = True) -> CodesRunner:
    """A file of whole numbers in onnxruntime, which also gives all its codes."""
    onnx = extra("onnx", "export")
    model = onnx.load(str(file))
    names = [node.output[0] for node in model.graph.node if node.output[0].endswith(CODES)]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime_session(model.SerializeToString(), torch.get_num_threads(), optimized=optimized)

    def run(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, *codes = session.run([LOGITS, *names], {IMAGE: images.numpy()})
        found = {name.removesuffix(CODES): torch.from_numpy(one) for name, one in zip(names, codes, strict=True)}
        return torch.from_numpy(logits), found

    return run


def openvino(file: Path) -> Runner:
    """An ONNX file in OpenVINO on the CPU."""
    compiled = openvino_model(file.read_bytes(), torch.get_num_threads())
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


def packed_codes(file: Path) -> CodesRunner:
    """A packed file, read back and computed with whole numbers in torch."""
    graph = read_packed(file)

    def run(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        codes: dict[str, Tensor] = {}
        return run_exactly(graph, images, codes.__setitem__), codes

    return run
