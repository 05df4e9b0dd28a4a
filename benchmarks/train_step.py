"""Time a training step (forward, backward, optimizer) of the quantized supernet beside that of a float network.

The float network is a subnet on its own, the largest or the smallest of a space. The supernet runs the same subnet on
the same batch. The two alternate, and the ratio is that of their medians. Where supernets are trained by the sandwich
rule, as of oqa-mbv3 and qfa-mbv3, there is a step of that: the ends of the sandwich and random subnets, with the frozen
largest as the teacher. It is compared with a float step of the largest subnet.

A GPU takes long over the first convolutions of a new shape, and most random subnets have new ones. So all steps are
taken twice, with the same subnets. "First" is the very first one, "new" the mean of the others at first, "steady" the
median of the second time. On a GPU three ways are timed, on the same subnets: "kernels" is the default, with fused
quantizers and convolutions without plans in supernets; "plans" has cuDNN's convolutions, "pure" the pure functions of
quantizers too. Shapes are new to the first way alone; --way chooses one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from apq.bit_widths import bits_throughout
from apq.cli import Parser, at_least, run
from apq.device import resolve_device
from apq.errors import UserError
from apq.genes import largest_subnet, smallest_subnet
from apq.presets import get_space
from apq.space import SearchSpace
from benchmarks.machine import describe
from elastic_nn.modules import convolution
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.quantizers import BATCHQUANT, LINEAR, LSQ, QuantScheme, fused
from elastic_nn.training.engine import Choose, Training, to_device, train_one_epoch
from elastic_nn.training.inheritance import frozen_largest
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.sampling import draw_subnets
from elastic_nn.training.session import Execution

Step = Callable[[], Any]
Clock = Callable[[], float]

LIMITS = {  # of ratios by schemes and subnets, on a CPU and on a GPU
    ("linear", "largest"): (1.25, 1.25),
    ("linear", "smallest"): (1.5, 1.6),
    ("batchquant", "largest"): (1.25, None),
    ("lsq", "sandwich of 4"): (4.5, 4.5),
    ("batchquant", "sandwich of 6"): (None, 7),
}
WAYS = {"kernels": (True, True), "plans": (True, False), "pure": (False, False)}  # fused quantizers, no plans
TITLES = (
    "subnet",
    "way",
    "float alone, ms",
    "quantized, ms",
    "ratio",
    "at most",
    "images/s, quantized",
    "first, s",
    "new, ms",
    "new / steady",
)


@dataclass(frozen=True)
class Pair:
    """A step of a float network and one of a quantized supernet. `restart` makes the latter draw the same subnets."""

    scheme: str
    name: str
    alone: Step
    quantized: Step
    restart: Step = lambda: None


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="apq-imagenet", help="a preset, or the path of a space in a .json file")
    parser.add_argument("--batch_size", type=at_least(2), default=16, help="images a step")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each network")
    parser.add_argument("--side", type=at_least(8), help="side of the images in pixels (default: the space's largest)")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    parser.add_argument("--way", choices=tuple(WAYS), help="time this way only (default: all that the device has)")
    parser.add_argument(
        "--processor_time", action="store_true", help="on a busy machine: time of this process's threads, on a CPU"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device, space = resolve_device(args.device), get_space(args.space)
    if args.processor_time and device.type != "cpu":
        raise UserError("--processor_time: the work of a GPU takes none; leave it out")
    ways, clock = ways_of(device, args.way), time.process_time if args.processor_time else time.perf_counter
    print(describe(), f"\n{device}, batch {args.batch_size}, {args.steps} steps each, in turns")
    side = args.side or space.resolutions[-1]
    print(f"{space.name}, {side} pixels, {'bfloat16 autocast' if args.amp else 'float32'}")
    print(f"| {' | '.join(TITLES)} |\n|{' --- |' * len(TITLES)}")
    torch.manual_seed(0)
    images = to_device(torch.randn(args.batch_size, space.in_channels, side, side), device)
    labels = torch.randint(space.n_classes, (args.batch_size,), device=device)
    for pair in pairs_of(space, images, labels, args.amp):
        for way in ways:
            is_fused, is_planless = WAYS[way]
            with fused.switched(is_fused), convolution.switched(is_planless):
                first, again = (timed_pass(pair, args.steps, device, clock) for _ in range(2))
            print(row_of(pair, way, first if way == ways[0] else None, again, images), flush=True)


def ways_of(device: torch.device, only: str | None) -> tuple[str, ...]:
    """Names of ways, in the order of measurement. UserError where the kernels do not run."""
    with fused.switched(True):
        runs = fused.runs_on(torch.ones(1, device=device))
    if only not in (None, "pure") and not runs:
        raise UserError(f"--way {only}: the kernels do not run on {device}")
    return (only,) if only else (tuple(WAYS) if runs else ("pure",))


def timed_pass(pair: Pair, steps: int, device: torch.device, clock: Clock) -> tuple[list[float], list[float]]:
    """Seconds of each step of the float network and of the supernet, which take turns."""
    pair.restart()
    both = [(timed(pair.alone, device, clock), timed(pair.quantized, device, clock)) for _ in range(steps)]
    return [one for one, _ in both], [other for _, other in both]


def row_of(
    pair: Pair,
    way: str,
    first: tuple[Sequence[float], Sequence[float]] | None,
    again: tuple[Sequence[float], Sequence[float]],
    images: Tensor,
) -> str:
    """A row of the table. `first` is None where shapes were known before."""
    alone, quantized = (statistics.median(times) for times in again)
    limit = LIMITS.get((pair.scheme, pair.name), (None, None))[images.device.type == "cuda"]
    cells = [pair.name, way, f"{1e3 * alone:.1f}", f"{1e3 * quantized:.1f}", f"{quantized / alone:.2f}", limit or "-"]
    cells.append(f"{len(images) / quantized:.1f}")
    new = first[1][1:] if first else []
    cells.append(f"{first[1][0]:.2f}" if first else "-")
    cells += [f"{1e3 * statistics.mean(new):.1f}", f"{statistics.mean(new) / quantized:.2f}"] if new else ["-", "-"]
    return f"| {' | '.join(map(str, cells))} |"


def pairs_of(space: SearchSpace, images: Tensor, labels: Tensor, amp: bool) -> Iterator[Pair]:
    """What is compared in a space."""
    if bits_throughout(space):
        yield sandwich(space, LSQ, "oqa-imagenet", images, labels, amp)
    elif space.shared_operands:  # the bits of every convolution are chosen
        yield from same_subnets(space, BATCHQUANT, images, labels, amp)
        yield sandwich(space, BATCHQUANT, "qfa-imagenet", images, labels, amp)
    else:
        yield from same_subnets(space, LINEAR, images, labels, amp)


def same_subnets(space: SearchSpace, scheme: QuantScheme, images: Tensor, labels: Tensor, amp: bool) -> Iterator[Pair]:
    """Steps of the largest and the smallest subnet, as a float network and in the quantized supernet."""
    for name, subnet in (("largest", largest_subnet(space)), ("smallest", smallest_subnet(space))):
        source = DynamicProxylessNASNets(space=space)
        source.activate(subnet)
        supernet = DynamicQuantizedProxylessNASNets(space=space, scheme=scheme)
        supernet.activate(subnet)
        yield Pair(
            scheme.name, name, *(stepper(net, images, labels, amp) for net in (source.get_active_subnet(), supernet))
        )


def sandwich(space: SearchSpace, scheme: QuantScheme, recipe: str, images: Tensor, labels: Tensor, amp: bool) -> Pair:
    """A step of the largest subnet as a float network, and one of the sandwich rule."""
    source = DynamicProxylessNASNets(space=space)
    alone = source.get_active_subnet()
    supernet = DynamicQuantizedProxylessNASNets(space=space, scheme=scheme)
    supernet.to(images.device)(images[:2])  # sets learned steps, also those of the teacher
    teacher = frozen_largest(source if scheme.mixed_precision else supernet, images.device)
    phase = replace(RECIPES[recipe].phases[-1], own_resolutions=False)  # all at the side of the images
    draws = [np.random.default_rng(0)]

    def restart() -> None:
        draws[0] = np.random.default_rng(0)

    taught = stepper(
        supernet, images, labels, amp, teacher=teacher, choose=lambda: draw_subnets(supernet, phase, draws[0])
    )
    return Pair(
        scheme.name, f"sandwich of {phase.subnets_per_step}", stepper(alone, images, labels, amp), taught, restart
    )


def stepper(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    amp: bool,
    teacher: nn.Module | None = None,
    choose: Choose = lambda: (lambda: None,),
) -> Step:
    """A function that takes a training step of one network."""
    net.to(images.device)
    config, execution = TrainConfig(epochs=1, lr=1e-3), Execution(amp=amp)
    training = Training(net, config, images.device, execution=execution, teacher=teacher)
    return partial(train_one_epoch, training, [(images, labels)], 0, choose)


def timed(step: Step, device: torch.device, clock: Clock) -> float:
    """Seconds of one call."""
    started = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


if __name__ == "__main__":
    run(main)
