"""Time a training step (forward, backward, optimizer) of the quantized supernet beside that of a float network.

The float network is a subnet on its own, the largest or the smallest of a space. The supernet runs the same subnet on
the same batch. The two alternate, and the ratio is that of their medians. If the space has one bit-width throughout,
like oqa-mbv2, the supernet takes a step of the sandwich rule instead: the largest, the smallest and two random subnets,
with the frozen largest as the teacher. It is compared with a float step of the largest subnet.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from apq.genes import largest_subnet, smallest_subnet
from apq.presets import get_space
from apq.space import SearchSpace
from benchmarks.machine import describe
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.quantizers import LSQ
from elastic_nn.training.engine import Choose, Training, to_device, train_one_epoch
from elastic_nn.training.inheritance import frozen_largest
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.sampling import draw_subnets
from elastic_nn.training.session import Execution

Step = Callable[[], Any]

LIMITS = {"largest": 1.25, "smallest": 1.5, "sandwich": 4.5}


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="apq-imagenet", help="a preset, or the path of a space in a .json file")
    parser.add_argument("--batch_size", type=at_least(2), default=16, help="images a step")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each network")
    parser.add_argument("--side", type=at_least(8), help="side of the images in pixels (default: the space's largest)")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device, space = resolve_device(args.device), get_space(args.space)
    print(describe(), f"\n{device}, batch {args.batch_size}, {args.steps} steps each, in turns")
    side = args.side or space.resolutions[-1]
    print(f"{space.name}, {side} pixels")
    print("| subnet | float alone, ms | quantized supernet, ms | ratio | at most | images/s, quantized |")
    print("| --- | --- | --- | --- | --- | --- |")
    torch.manual_seed(0)
    images = to_device(torch.randn(args.batch_size, space.in_channels, side, side), device)
    labels = torch.randint(space.n_classes, (args.batch_size,), device=device)
    for name, alone, quantized in (sandwich if bits_throughout(space) else same_subnets)(
        space, images, labels, args.amp
    ):
        steps, times = (alone, quantized), ([], [])
        for step in steps:
            step()
            step()
        for _ in range(args.steps):
            for step, found in zip(steps, times, strict=True):
                found.append(timed(step, device))
        one, other = (statistics.median(found) for found in times)
        cells = [f"{1e3 * one:.0f}", f"{1e3 * other:.0f}", f"{other / one:.2f}", f"{LIMITS[name]}"]
        print(f"| {name} | " + " | ".join(cells) + f" | {args.batch_size / other:.1f} |", flush=True)


def same_subnets(space: SearchSpace, images: Tensor, labels: Tensor, amp: bool) -> Iterator[tuple[str, Step, Step]]:
    """Steps of the largest and the smallest subnet, as a float network and in the quantized supernet."""
    for name, subnet in (("largest", largest_subnet(space)), ("smallest", smallest_subnet(space))):
        source = DynamicProxylessNASNets(space=space)
        source.activate(subnet)
        supernet = DynamicQuantizedProxylessNASNets(space=space)
        supernet.activate(subnet)
        yield name, *(stepper(net, images, labels, amp) for net in (source.get_active_subnet(), supernet))


def sandwich(space: SearchSpace, images: Tensor, labels: Tensor, amp: bool) -> Iterator[tuple[str, Step, Step]]:
    """A step of the largest subnet as a float network, and one of the sandwich rule with learned steps."""
    alone = DynamicProxylessNASNets(space=space).get_active_subnet()
    supernet = DynamicQuantizedProxylessNASNets(space=space, scheme=LSQ)
    teacher = frozen_largest(supernet, images.device)
    phase = replace(RECIPES["oqa-imagenet"].phases[-1], own_resolutions=False)  # all at the side of the images
    choose = partial(draw_subnets, supernet, phase, np.random.default_rng(0))
    taught = stepper(supernet, images, labels, amp, teacher=teacher, choose=choose)
    yield "sandwich", stepper(alone, images, labels, amp), taught


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
    return lambda: train_one_epoch(training, [(images, labels)], 0, choose)


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)
