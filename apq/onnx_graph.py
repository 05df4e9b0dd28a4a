"""Builds an ONNX file node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.extras import extra

OPSET, OPSET_INT2 = 21, 25  # that of 4-bit integers, and the first one with 2-bit integers
IR_VERSION = {OPSET: 10, OPSET_INT2: 13}
BATCH = "batch"  # the name of the batch's size


class OnnxGraph:
    """An ONNX graph in the making. Values are known by their names, which the methods return.

    Equal constants are stored once.
    """

    def __init__(self, name: str, opset: int = OPSET, domains: Mapping[str, int] | None = None) -> None:
        self.onnx = extra("onnx", "export")
        self.name, self.opsets = name, {"": opset, **(domains or {})}
        self._nodes, self._constants, self._ends = [], {}, {"input": [], "output": []}
        self._names: set[str] = set()

    def input(self, name: str, shape: Sequence[int | str], dtype: str = "float") -> str:
        """An input of the graph. A size given as text varies."""
        return self._end("input", name, shape, dtype)

    def output(self, name: str, shape: Sequence[int | str], dtype: str = "float") -> str:
        """Make a value an output of the graph."""
        return self._end("output", name, shape, dtype)

    def constant(self, array: Any, name: str = "constant", dtype: str | None = None) -> str:
        """A stored array. `dtype` names a type of ONNX that numpy lacks, such as "int4"."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, dtype, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._tensor(array, self._unique(name), dtype)
        return self._constants[key].name

    def node(self, op: str, *inputs: str, name: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, whose name is returned: `name`, or one made of that of the operation."""
        output = self._unique(name or op.lower())
        made = self.onnx.helper.make_node(op, list(inputs), [output], name=output, domain=domain, **attributes)
        self._nodes.append(made)
        return output

    def model(self, metadata: Mapping[str, str]) -> Any:
        """The ONNX model, checked. UserError where ONNX finds it wrong."""
        onnx = self.onnx
        constants = list(self._constants.values())
        graph = onnx.helper.make_graph(
            self._nodes, self.name, self._ends["input"], self._ends["output"], initializer=constants
        )
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = onnx.helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION[self.opsets[""]], producer_name="apq"
        )
        onnx.helper.set_model_props(model, dict(metadata))
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise UserError(f"the ONNX file of {self.name} would be wrong: {error}") from error
        return model

    def data(self, metadata: Mapping[str, str]) -> bytes:
        """The file's bytes."""
        return self.model(metadata).SerializeToString()

    def _tensor(self, array: np.ndarray, name: str, dtype: str | None) -> Any:
        if dtype is None:
            return self.onnx.numpy_helper.from_array(array, name)
        kind = getattr(self.onnx.TensorProto, dtype.upper())
        return self.onnx.helper.make_tensor(name, kind, array.shape, array.flatten().tolist())

    def _end(self, kind: str, name: str, shape: Sequence[int | str], dtype: str) -> str:
        type_ = getattr(self.onnx.TensorProto, dtype.upper())
        self._ends[kind].append(self.onnx.helper.make_tensor_value_info(name, type_, list(shape)))
        self._names.add(name)
        return name

    def _unique(self, name: str) -> str:
        found, i = name, 1
        while found in self._names:
            found, i = f"{name}_{i}", i + 1
        self._names.add(found)
        return found
