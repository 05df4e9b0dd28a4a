"""What does the first convolution of a new shape cost, for each kind of convolution and pass?

Each shape is one that no convolution had before in this process: a number of channels that no earlier one has. Its
first call is timed, and then the median of some more. The difference is what cuDNN needs to plan: to choose an
algorithm and to build its kernels. What needs no plan: a "matrix" computes a 1x1 convolution as a product of matrices,
"native" a depthwise convolution by torch's own kernels (cuDNN off), "own" by those of `elastic_nn.modules.convolution`,
whose first call of all compiles them. On a CPU the table shows what oneDNN needs.

A second table counts plans: the different shapes of the convolutions of random subnets of a space, each of which has a
plan for each pass, and how many are left in a supernet on a GPU, where 1x1 and depthwise convolutions have none.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apq.cli import Parser, at_least, run
from apq.device import resolve_device
from apq.genes import sample, subnets_of
from apq.layers import layers_of
from apq.presets import get_space
from apq.space import SearchSpace
from benchmarks.machine import describe
from benchmarks.markdown import markdown
from elastic_nn.modules.convolution import depthwise_convolution, input_gradient, weight_gradient
from elastic_nn.quantizers import fused

PASSES = ("forward", "gradient of input", "gradient of weights")


@dataclass(frozen=True)
class Kind:
    """A kind of convolution: kernel size, stride, side of the input, and how it is computed."""

    name: str
    kernel: int
    side: int
    stride: int = 1
    depthwise: bool = False
    way: str = "cudnn"


KINDS = (
    Kind("first 3x3, stride 2", 3, 224, stride=2),
    Kind("1x1", 1, 28),
    Kind("1x1, matrix", 1, 28, way="matrix"),
    *(Kind(f"depthwise {k}x{k}", k, 28, depthwise=True) for k in (3, 5, 7)),
    Kind("depthwise 5x5, stride 2", 5, 28, stride=2, depthwise=True),
    *(Kind(f"depthwise {k}x{k}, native", k, 28, depthwise=True, way="native") for k in (3, 5, 7)),
    *(Kind(f"depthwise {k}x{k}, own", k, 28, depthwise=True, way="own") for k in (3, 5, 7)),
    Kind("depthwise 5x5, stride 2, own", 5, 28, stride=2, depthwise=True, way="own"),
)


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images")
    parser.add_argument("--shapes", type=at_least(1), default=8, help="new shapes of each kind")
    parser.add_argument("--repeats", type=at_least(1), default=10, help="calls of each shape after the first")
    parser.add_argument("--space", default="oqa-mbv3", help="a preset, or the path of a space in a .json file")
    parser.add_argument("--subnets", type=at_least(1), default=4000, help="random subnets whose shapes are counted")
    parser.add_argument("--amp", action="store_true", help="bfloat16 instead of float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device, dtype = resolve_device(args.device), torch.bfloat16 if args.amp else torch.float32
    print(describe(), f"\n{device}, {dtype}, channels last, batch {args.batch_size}, {args.shapes} shapes of a kind\n")
    titles = ("convolution", "pass", "first call, ms", "slowest, ms", "later calls, ms", "plan, ms")
    kinds = [kind for kind in KINDS if kind.way != "own" or fused.runs_on(torch.ones(1, device=device))]
    print(markdown(titles, [row for kind in kinds for row in rows_of(kind, args, device, dtype)]))
    space = get_space(args.space)
    print(f"\nConvolutions of different shapes in random subnets of {space.name}, at their resolutions\n")
    titles = ("subnets", "shapes", "1x1", "depthwise", "that need plans in a supernet")
    counts = [n for n in (1, 10, 100, 1000, 10**4) if n < args.subnets] + [args.subnets]
    print(markdown(titles, shapes_of_subnets(space, counts)))


def shapes_of_subnets(space: SearchSpace, counts: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """A row for each number of subnets: how many different shapes the first of them have."""
    seen: set[tuple[int, ...]] = set()
    subnets = subnets_of(space, sample(space, counts[-1], np.random.default_rng(0)))
    for number, subnet in enumerate(subnets, start=1):
        for layer in layers_of(space, subnet):
            if not layer.linear and layer.input_size > 1:  # which are products of matrices everywhere
                sizes = layer.kernel_size, layer.input_size, layer.stride
                seen.add((*sizes, layer.in_channels, layer.out_channels, layer.groups))
        if number in counts:
            matrices = sum(kernel == 1 for kernel, *_ in seen)
            depthwise = sum(groups > 1 for *_, groups in seen)
            yield (*map(str, (number, len(seen), matrices, depthwise, len(seen) - matrices - depthwise)),)


def rows_of(
    kind: Kind, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, ...]]:
    """A row for each pass: means over shapes of the first call and of the median of later ones."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PASSES}
    for i in range(args.shapes):
        calls = calls_of(kind, args.batch_size, 40 + 8 * i, device, dtype)
        for name, call in zip(PASSES, calls, strict=True):
            first, *later = (seconds(call, device) for _ in range(1 + args.repeats))
            found[name].append((1e3 * first, 1e3 * statistics.median(later)))
    for name, times in found.items():
        first, later = (statistics.mean(column) for column in zip(*times, strict=True))
        slowest = max(one for one, _ in times)
        yield (kind.name, name, *(f"{ms:.2f}" for ms in (first, slowest, later, first - later)))


def calls_of(
    kind: Kind, batch_size: int, channels: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], ...]:
    """Functions that compute the passes of a convolution with this number of channels."""
    inputs = 3 if kind.name.startswith("first") else channels
    place = {"device": device, "dtype": dtype}
    x = torch.randn(batch_size, inputs, kind.side, kind.side, **place).to(memory_format=torch.channels_last)
    w = torch.randn(channels, 1 if kind.depthwise else inputs, kind.kernel, kind.kernel, **place)
    if kind.way == "matrix":
        rows, matrix = x.permute(0, 2, 3, 1).flatten(0, 2), w.flatten(1)  # (N H W, C), (D, C)
        grad = torch.randn(len(rows), channels, **place)
        return lambda: rows @ matrix.T, lambda: grad @ matrix, lambda: grad.T @ rows
    out = (batch_size, channels, *(-(-kind.side // kind.stride),) * 2)
    grad = torch.randn(out, **place).to(memory_format=torch.channels_last)
    if kind.way == "own":
        return (
            lambda: depthwise_convolution(x, w, kind.stride),
            lambda: input_gradient(grad, w, (kind.side, kind.side), kind.stride),
            lambda: weight_gradient(x, grad, kind.kernel, kind.stride),
        )
    groups, padding = inputs if kind.depthwise else 1, kind.kernel // 2

    def forward() -> Tensor:
        with way_of(kind):
            return F.conv2d(x, w, None, kind.stride, padding, groups=groups)

    def backward(of_input: bool) -> Tensor:
        settings = ([kind.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
        with way_of(kind):
            both = torch.ops.aten.convolution_backward(grad, x, w, None, *settings, [of_input, not of_input, False])
            return both[0 if of_input else 1]

    return forward, lambda: backward(True), lambda: backward(False)


def way_of(kind: Kind) -> contextlib.AbstractContextManager:
    """Context in which a kind is computed in its way."""
    return torch.backends.cudnn.flags(enabled=False) if kind.way == "native" else contextlib.nullcontext()


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)
