"""Operations between layers, each in three ways: as the network has it, exactly, and as nodes of ONNX.

"Exactly" means in operations that every runtime rounds alike: sums and functions are computed in float64 and rounded
to float32 once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apq.onnx_graph import OnnxGraph

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        run: of torch, as the network has it: (settings, *values) -> value.
        exact: the same in operations that all runtimes round alike.
        emit: adds nodes that compute `exact`, and returns the name of their value: (graph, settings, *names) -> name.
        plain: adds nodes of the usual form, for files whose values need not be exact; by default `emit`.
    """

    run: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    emit: Callable[..., str]
    plain: Callable[..., str]


def _simple(
    run: Callable[..., Tensor],
    emit: Callable[..., str],
    exact: Callable[..., Tensor] | None = None,
    plain: Callable[..., str] | None = None,
) -> Operation:
    return Operation(run, exact or run, emit, plain or emit)


def _node(op: str, **attributes: Any) -> Callable[..., str]:
    return lambda graph, settings, *names: graph.node(op, *names, **attributes)


def clip(graph: OnnxGraph, name: str, low: float, high: float) -> str:
    """Adds a clip to [low, high]."""
    edges = (graph.constant(np.float32(edge), "edge") for edge in (low, high))
    return graph.node("Clip", name, *edges)


def _sixth(graph: OnnxGraph, name: str) -> str:
    """max(0, min(x + 3, 6)) / 6"""
    shifted = graph.node("Add", name, graph.constant(np.float32(3), "three"))
    return graph.node("Div", clip(graph, shifted, 0, 6), graph.constant(np.float32(6), "six"))


def _exact_sixth(settings: Settings, x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


def in_double(graph: OnnxGraph, name: str, compute: Callable[[str], str]) -> str:
    """Adds a computation in float64 between two casts."""
    double = graph.node("Cast", name, to=graph.onnx.TensorProto.DOUBLE)
    return graph.node("Cast", compute(double), to=graph.onnx.TensorProto.FLOAT)


def _mean(graph: OnnxGraph, settings: Settings, name: str) -> str:
    return in_double(graph, name, lambda double: _plain_mean(graph, settings, double))


def _plain_mean(graph: OnnxGraph, settings: Settings, name: str) -> str:
    return graph.node("ReduceMean", name, graph.constant(np.array([2, 3]), "axes"), keepdims=int(settings["keepdim"]))


def _in_double(of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda settings, x: of(x.double()).float()


def pad(graph: OnnxGraph, settings: Settings, name: str) -> str:
    """Adds rows and columns of zeros: above, left, below, right."""
    top, left, bottom, right = settings["pads"]
    return graph.node("Pad", name, graph.constant(np.array([0, 0, top, left, 0, 0, bottom, right]), "pads"))


def _padded(settings: Settings, x: Tensor) -> Tensor:
    top, left, bottom, right = settings["pads"]
    return F.pad(x, (left, right, top, bottom))


def _pool(op: str) -> Callable[..., str]:
    def emit(graph: OnnxGraph, settings: Settings, name: str) -> str:
        pads = [*settings["padding"]] * 2
        more = {"count_include_pad": int(settings["count_include_pad"])} if op == "AveragePool" else {}
        windows = {"kernel_shape": settings["kernel_size"], "strides": settings["stride"], "pads": pads}
        return graph.node(op, name, ceil_mode=int(settings["ceil_mode"]), **windows, **more)

    return emit


def _max_pool(settings: Settings, x: Tensor) -> Tensor:
    return F.max_pool2d(
        x, settings["kernel_size"], settings["stride"], settings["padding"], ceil_mode=settings["ceil_mode"]
    )


def _average_pool(settings: Settings, x: Tensor) -> Tensor:
    windows = settings["kernel_size"], settings["stride"], settings["padding"]
    return F.avg_pool2d(x, *windows, settings["ceil_mode"], settings["count_include_pad"])


def _per_channel(x: Tensor, values: Tensor) -> Tensor:
    """Values of channels in a shape that broadcasts against (N, C, ...)."""
    return values.view(-1, *[1] * (x.ndim - 2))


def _scale(settings: Settings, x: Tensor) -> Tensor:
    return x * _per_channel(x, settings["multiplier"]) + _per_channel(x, settings["bias"])


def _emit_scale(graph: OnnxGraph, settings: Settings, name: str) -> str:
    shape = (-1, *[1] * (settings["ndim"] - 2))  # as `_per_channel`
    multiplier, bias = (settings[key].reshape(shape).numpy() for key in ("multiplier", "bias"))
    product = graph.node("Mul", name, graph.constant(multiplier, "multiplier"))
    return graph.node("Add", product, graph.constant(bias, "bias"))


def _silu(graph: OnnxGraph, settings: Settings, name: str) -> str:
    return in_double(graph, name, lambda double: graph.node("Mul", double, graph.node("Sigmoid", double)))


OPERATIONS: dict[str, Operation] = {
    "add": _simple(lambda settings, x, y: x + y, _node("Add")),
    "mul": _simple(lambda settings, x, y: x * y, _node("Mul")),
    "relu": _simple(lambda settings, x: F.relu(x), _node("Relu")),
    "relu6": _simple(lambda settings, x: F.relu6(x), lambda graph, settings, name: clip(graph, name, 0, 6)),
    "hard_swish": _simple(
        lambda settings, x: F.hardswish(x),
        lambda graph, settings, name: graph.node("Mul", name, _sixth(graph, name)),
        lambda settings, x: x * _exact_sixth(settings, x),
        _node("HardSwish"),
    ),
    "hard_sigmoid": _simple(
        lambda settings, x: F.hardsigmoid(x),
        lambda graph, settings, name: _sixth(graph, name),
        _exact_sixth,
        _node("HardSigmoid", alpha=1 / 6, beta=0.5),
    ),
    "sigmoid": _simple(
        lambda settings, x: torch.sigmoid(x),
        lambda graph, settings, name: in_double(graph, name, lambda double: graph.node("Sigmoid", double)),
        _in_double(torch.sigmoid),
        _node("Sigmoid"),
    ),
    "silu": _simple(
        lambda settings, x: F.silu(x),
        _silu,
        _in_double(lambda x: x * torch.sigmoid(x)),
        lambda graph, settings, name: graph.node("Mul", name, graph.node("Sigmoid", name)),
    ),
    "mean": _simple(
        lambda settings, x: x.mean((2, 3), keepdim=settings["keepdim"]),
        _mean,
        lambda settings, x: x.double().mean((2, 3), keepdim=settings["keepdim"]).float(),
        _plain_mean,
    ),
    "flatten": _simple(lambda settings, x: x.flatten(1), _node("Flatten", axis=1)),
    "concat": _simple(lambda settings, *parts: torch.cat(parts, dim=1), _node("Concat", axis=1)),
    "pad": _simple(_padded, pad),
    "max_pool": _simple(_max_pool, _pool("MaxPool")),
    "average_pool": _simple(
        _average_pool,
        lambda graph, settings, name: in_double(
            graph, name, lambda double: _pool("AveragePool")(graph, settings, double)
        ),
        lambda settings, x: _average_pool(settings, x.double()).float(),
        _pool("AveragePool"),
    ),
    "scale": _simple(_scale, _emit_scale),
}
