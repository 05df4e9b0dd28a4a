"""One training step (forward, backward, optimiser) of the quantized supernet against a float network of its own.

Both run the same subnet, the largest and the smallest of a space, on the same batch, in turns; the ratio is of the
medians. The float network is the extracted stand-alone subnet.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq.cli import Parser, at_least, run
from apq.device import resolve_device
from apq.genes import largest_subnet, smallest_subnet
from apq.presets import get_space
from benchmarks.machine import describe
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.training.engine import TrainConfig, make_optimizer, to_device

LIMITS = {"largest": 1.25, "smallest": 1.5}


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="apq-imagenet", help="a preset, or the path of a space in a .json file")
    parser.add_argument("--batch_size", type=at_least(2), default=16, help="images a step")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each network")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device, space = resolve_device(args.device), get_space(args.space)
    print(describe(), f"\n{device}, batch {args.batch_size}, {args.steps} steps each, in turns")
    print("| subnet | float alone, ms | quantized supernet, ms | ratio | at most | images/s, quantized |")
    print("| --- | --- | --- | --- | --- | --- |")
    torch.manual_seed(0)
    side = space.resolutions[-1]
    images = to_device(torch.randn(args.batch_size, space.in_channels, side, side), device)
    labels = torch.randint(space.n_classes, (args.batch_size,), device=device)
    for name, subnet in (("largest", largest_subnet(space)), ("smallest", smallest_subnet(space))):
        source = DynamicProxylessNASNets(space=space)
        source.activate(subnet)
        supernet = DynamicQuantizedProxylessNASNets(space=space)
        supernet.activate(subnet)
        nets = [source.get_active_subnet(), supernet]
        steps = [stepper(net.to(device).train(), images, labels, args.amp) for net in nets]
        times: list[list[float]] = [[], []]
        for step in steps:
            step()
            step()
        for _ in range(args.steps):
            for step, found in zip(steps, times, strict=True):
                found.append(timed(step, device))
        alone, quantized = (statistics.median(found) for found in times)
        cells = [f"{1e3 * alone:.0f}", f"{1e3 * quantized:.0f}", f"{quantized / alone:.2f}", f"{LIMITS[name]}"]
        print(f"| {name} | " + " | ".join(cells) + f" | {args.batch_size / quantized:.1f} |", flush=True)


def stepper(net: nn.Module, images: Tensor, labels: Tensor, amp: bool) -> Callable[[], None]:
    """A training step of one network."""
    optimizer = make_optimizer(net, TrainConfig(epochs=1, lr=1e-3))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)
