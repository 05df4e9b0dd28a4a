"""Turns a network into a graph of frozen layers, by torch's symbolic tracing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from apq.errors import UserError
from elastic_nn.modules.quant_layers import QuantizedLayer
from elastic_nn.modules.squeeze_excite import ElasticSqueezeExcite
from export.frozen import freeze
from export.graph import IMAGE, Graph, Node, Norm
from export.operations import OPERATIONS
from export.padding import without_pads

# Operations by the modules and functions that compute them. `None` passes its input on in evaluation.
MODULES: dict[type[nn.Module], str | None] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hard_swish",
    nn.Hardsigmoid: "hard_sigmoid",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Identity: None,
    nn.Dropout: None,
    nn.Dropout2d: None,
    StochasticDepth: None,
}
FUNCTIONS: dict[Callable[..., Any] | str, str | None] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    "add": "add",
    "add_": "add",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.hardswish: "hard_swish",
    F.hardsigmoid: "hard_sigmoid",
    torch.sigmoid: "sigmoid",
    F.silu: "silu",
    F.dropout: None,
    "contiguous": None,
}


def trace(net: nn.Module, image_shape: tuple[int, ...]) -> Graph:
    """The network in evaluation as a graph for images of (C, H, W). It stays as it was.

    UserError names what cannot be exported.
    """
    try:
        traced = _Tracer().trace(net)
    except (fx.proxy.TraceError, TypeError, ValueError) as error:
        raise UserError(f"a {type(net).__name__} cannot be exported: {_first_line(error)}") from error
    return _Builder(net, image_shape).build(traced)


class _Tracer(fx.Tracer):
    """Stops at layers, norms and the operations that are known."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = (QuantizedLayer, ElasticSqueezeExcite, nn.modules.batchnorm._BatchNorm, StochasticDepth, *MODULES)
        return isinstance(m, known) or super().is_leaf_module(m, module_qualified_name)


class _Builder:
    """Collects the nodes of a graph, with the values for one example image, which give the shapes."""

    def __init__(self, net: nn.Module, image_shape: tuple[int, ...]) -> None:
        self.net, self.image_shape = net, image_shape
        self.nodes: list[Node] = []
        self.modules: Mapping[str, nn.Module] = dict(net.named_modules())
        self.shapes = {IMAGE: tuple(image_shape)}

    def build(self, traced: fx.Graph) -> Graph:
        names: dict[fx.Node, str] = {}
        for node in traced.nodes:
            if node.op == "placeholder":
                if names:
                    raise UserError("a network with several inputs cannot be exported")
                names[node] = IMAGE
            elif node.op == "output":
                return self._finish(names, node.args[0])
            else:
                names[node] = self._add(node, names)
        raise UserError("a network without an output cannot be exported")

    def _finish(self, names: Mapping[fx.Node, str], output: Any) -> Graph:
        if not isinstance(output, fx.Node):
            raise UserError("a network with several outputs cannot be exported")
        if self.nodes[-1].name != names[output]:
            raise UserError("a network whose last operation is not its output cannot be exported")
        return without_pads(Graph(image_shape=tuple(self.image_shape), nodes=tuple(self.nodes)))

    def _add(self, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
        """Add the nodes of one traced node, and return the name of its value."""
        inputs = [names[arg] for arg in node.all_input_nodes]
        if node.op == "call_module":
            return self._add_module(node.target, self.modules[node.target], inputs)
        target = node.target
        if target in (torch.flatten, "flatten"):
            if self._arguments(node, ("start_dim", 0), ("end_dim", -1)) != [1, -1]:
                raise UserError(f"operation {node.name} flattens images together, which cannot be exported")
            return self._operation("flatten", inputs, node.name)
        if target in (torch.mean, "mean"):
            axes, keepdim = self._arguments(node, ("dim", None), ("keepdim", False))
            if sorted(a % 4 for a in axes or ()) == [2, 3]:
                return self._operation("mean", inputs, node.name, keepdim=bool(keepdim))
        if target is torch.cat and self._arguments(node, ("dim", 0)) == [1]:
            return self._operation("concat", [names[part] for part in node.args[0]], node.name)
        if target is F.adaptive_avg_pool2d and self._arguments(node, ("output_size", None))[0] in (1, (1, 1)):
            return self._operation("mean", inputs, node.name, keepdim=True)
        if target is F.pad:
            widths, mode, value = self._arguments(node, ("pad", ()), ("mode", "constant"), ("value", None))
            if mode == "constant":
                return self._pad(node.name, widths, value or 0, inputs)
        if target in FUNCTIONS:
            op, tensors = FUNCTIONS[target], [arg for arg in node.args if isinstance(arg, fx.Node)]
            if op is None:
                return inputs[0]
            if op not in ("add", "mul") or (len(tensors) == 2 and len(node.args) == 2):
                return self._operation(op, [names[arg] for arg in tensors], node.name)
        raise UserError(f"operation {node.name} ({getattr(target, '__name__', target)}) cannot be exported")

    @staticmethod
    def _arguments(node: fx.Node, *known: tuple[str, Any]) -> list[Any]:
        """The arguments after the first, by position or by name."""
        given = dict(zip((name for name, _ in known), node.args[1:], strict=False)) | dict(node.kwargs)
        return [given.get(name, default) for name, default in known]

    def _add_module(self, name: str, module: nn.Module, inputs: list[str]) -> str:
        if isinstance(module, ElasticSqueezeExcite):
            return self._add_squeeze(name, module, inputs)
        if isinstance(module, QuantizedLayer | nn.Conv2d | nn.Linear):
            return self._layer(name, module, inputs)
        if isinstance(module, nn.BatchNorm2d):
            return self._norm(name, module, inputs)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._operation("flatten", inputs, name)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return self._adaptive_pool(name, module, inputs)
        if isinstance(module, nn.ConstantPad2d):  # and its subclass ZeroPad2d
            return self._pad(name, module.padding, module.value, inputs)
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            return self._pool(name, module, inputs)
        for kind, op in MODULES.items():
            if isinstance(module, kind):
                return inputs[0] if op is None else self._operation(op, inputs, name)
        raise UserError(f"module {name} is a {type(module).__name__}, which cannot be exported")

    def _add_squeeze(self, name: str, module: ElasticSqueezeExcite, inputs: list[str]) -> str:
        mean = self._operation("mean", inputs, f"{name}.mean", keepdim=True)
        inside = self._operation("relu", [self._layer(f"{name}.reduce", module.reduce, [mean])], f"{name}.relu")
        gate = self._layer(f"{name}.excite", module.excite, [inside])
        gate = self._operation("hard_sigmoid", [gate], f"{name}.gate")
        return self._operation("mul", [*inputs, gate], name)

    def _pool(self, name: str, module: nn.MaxPool2d | nn.AvgPool2d, inputs: list[str]) -> str:
        if getattr(module, "dilation", 1) != 1 or getattr(module, "divisor_override", None):
            raise UserError(f"module {name} is a {type(module).__name__} with settings that cannot be exported")
        windows = {key: _pair(getattr(module, key)) for key in ("kernel_size", "stride", "padding")}
        more = {"ceil_mode": module.ceil_mode, "count_include_pad": getattr(module, "count_include_pad", True)}
        op = "max_pool" if isinstance(module, nn.MaxPool2d) else "average_pool"
        return self._operation(op, inputs, name, **windows, **more)

    def _pad(self, name: str, widths: Sequence[int], value: float, inputs: list[str]) -> str:
        """Rows and columns around a map; `widths` are torch's: left, right, top, bottom."""
        widths = [*widths, *[0] * (4 - len(widths))]
        if value != 0 or min(widths) < 0 or len(widths) > 4:
            raise UserError(f"{name} pads by {tuple(widths)} with {value}: only rows and columns of 0 can be exported")
        left, right, top, bottom = widths
        return self._operation("pad", inputs, name, pads=(top, left, bottom, right))

    def _adaptive_pool(self, name: str, module: nn.AdaptiveAvgPool2d, inputs: list[str]) -> str:
        """A pooling whose windows follow the side of its input: a mean, or windows of one size where they fit."""
        sides, found = self.shapes[inputs[0]][1:], _pair(module.output_size)
        if found == (1, 1):
            return self._operation("mean", inputs, name, keepdim=True)
        if any(not n or side % n for side, n in zip(sides, found, strict=True)):
            raise UserError(
                f"module {name} makes {found} of {sides}, by windows of several sizes: it cannot be exported"
            )
        windows = tuple(side // n for side, n in zip(sides, found, strict=True))
        settings = {"kernel_size": windows, "stride": windows, "padding": (0, 0), "ceil_mode": False}
        return self._operation("average_pool", inputs, name, **settings, count_include_pad=True)

    def _layer(self, name: str, module: nn.Module, inputs: list[str]) -> str:
        shape = self.shapes[inputs[0]]
        layer = freeze(name, module, shape[0])
        example = torch.zeros(1, *shape, device="meta")
        found = layer.run(example, layer.weights.codes.float().to("meta")).shape[1:]
        return self._put(Node(name=name, op="layer", inputs=tuple(inputs), shape=tuple(found), layer=layer))

    def _norm(self, name: str, module: nn.BatchNorm2d, inputs: list[str]) -> str:
        if module.running_mean is None:
            raise UserError(f"norm {name} has no statistics: it depends on the batch, and cannot be exported")
        channels = self.shapes[inputs[0]][0]
        ones = torch.ones(module.num_features)
        parts = (module.running_mean, module.running_var, module.weight, module.bias)
        mean, variance, weight, bias = (
            (default if part is None else part.detach().clone())[:channels]
            for part, default in zip(parts, (ones, ones, ones, 0 * ones), strict=True)
        )
        norm = Norm(mean=mean, variance=variance, weight=weight, bias=bias, eps=module.eps)
        return self._put(Node(name=name, op="norm", inputs=tuple(inputs), shape=self.shapes[inputs[0]], norm=norm))

    def _operation(self, op: str, inputs: list[str], name: str, **settings: Any) -> str:
        values = [torch.zeros(1, *self.shapes[one]) for one in inputs]
        shape = tuple(OPERATIONS[op].run(settings, *values).shape[1:])
        return self._put(Node(name=name, op=op, inputs=tuple(inputs), shape=shape, settings=settings))

    def _put(self, node: Node) -> str:
        """Add a node. A module that runs twice has a name for each run."""
        name, i = node.name, 1
        while name in self.shapes:
            name, i = f"{node.name}_{i}", i + 1
        self.nodes.append(Node(**{**vars(node), "name": name}))
        self.shapes[name] = node.shape
        return name


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
