"""The forms that a network is exported in, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from apq.extras import extra
from export.graph import Graph, folded
from export.integer_file import integer
from export.onnx_file import qcdq, qonnx
from export.packed import packed_data

WRITERS = {"packed": "safetensors"}  # libraries that write a form; others need onnx
RUNTIMES = {  # those that check it, with their groups of dependencies
    "onnx": (("onnxruntime", "export"),),  # OpenVINO is left out where it is not installed
    "onnx-integer": (("onnxruntime", "export"),),
    "qonnx": (("onnxruntime", "export"), ("qonnx", "export-check")),
    "packed": (),
}


def check_libraries(form: str, *, checked: bool) -> None:
    """UserError before any work if a library that a form needs is not installed."""
    extra(WRITERS.get(form, "onnx"), "export")
    for module, group in RUNTIMES[form] if checked else ():
        extra(module, group)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form, with what its file tells. `packed_weights`: with 4- and 2-bit integers, in the form onnx."""

    name: str
    packed_weights: bool
    metadata: Mapping[str, str]


def data_of(graph: Graph, form: Form) -> bytes:
    """The file of a graph, as traced, in a form. UserError where the form cannot hold the network."""
    name = form.metadata.get("space") or form.metadata.get("model", "network")
    if form.name == "packed":
        return packed_data(folded(graph), form.metadata)
    if form.name == "onnx-integer":
        made = integer(folded(graph), name)
    elif form.name == "qonnx":
        made = qonnx(graph, name)
    else:
        made = qcdq(graph, name, packed=form.packed_weights)
    return made.data(form.metadata)
