"""Images a second of the loader, beside a bare torchvision pipeline on the same files, and beside the training step.

It writes JPEG files to a temporary folder: smooth colours under noise, with about as many bytes as photographs have.
The bare pipeline is ImageFolder, RandomResizedCrop, mirroring, ToTensor and Normalize in a DataLoader with as many
processes. The two read the training images in turns, in epochs of `--batch_size`, and medians count. "A core" is images
by seconds of computing of all their processes, so that others on the machine matter little. The step is that of the
largest and the smallest subnet of the space, as a float network on its own, on one batch.

The last table is the course of a training: in each of `--phases` phases an epoch, and after it for two subnets of
different sides a recalibration on `RECALIBRATED` images and an evaluation. The bare way has a loader for each split and
side, which starts processes of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from apq.cli import Parser, add_common_flags, add_deterministic_flag, at_least, run
from apq.device import resolve_device
from apq.genes import largest_subnet, smallest_subnet
from apq.machine import n_cores
from apq.presets import get_space
from apq.space import SearchSpace
from benchmarks.machine import describe
from benchmarks.markdown import markdown
from dataset import load_splits
from dataset.imagenet import image_folder_space
from dataset.splits import Splits, make_loader
from dataset.table import PHOTOS
from dataset.workers import end_workers, n_workers
from elastic_nn.networks import DynamicProxylessNASNets
from elastic_nn.training.batchnorm import RECALIBRATION_BATCH, recalibration_batches
from elastic_nn.training.distributed import joined
from elastic_nn.training.engine import EVALUATION_BATCH, Training, to_device, train_one_epoch
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.session import Execution

CLASSES, QUALITY = 4, 90
RECALIBRATED = 128  # images
GOAL = 0.95  # of the bare pipeline's images a core
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass over batches took: images, seconds, seconds of computing of all processes of this program."""

    images: int
    seconds: float
    cpu: float


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="apq-imagenet", help="a preset, or the path of a space in a .json file")
    parser.add_argument("--images", type=at_least(40), default=400, help="training images to write")
    parser.add_argument("--width", type=at_least(8), default=500, help="pixels of a row of an image")
    parser.add_argument("--height", type=at_least(8), default=375, help="rows of an image")
    parser.add_argument("--side", type=at_least(8), help="side of crops in pixels (default: the space's largest)")
    parser.add_argument("--batch_size", type=at_least(2), default=256, help="images a step")
    parser.add_argument("--epochs", type=at_least(1), default=3, help="timed passes of each pipeline, in turns")
    parser.add_argument("--steps", type=at_least(0), default=3, help="timed training steps of each subnet; 0: none")
    parser.add_argument("--phases", type=at_least(1), default=3, help="phases of the course of a training")
    parser.add_argument("--amp", action="store_true", help="compute steps in bfloat16 where that is safe")
    add_deterministic_flag(parser)
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    execution = Execution(amp=args.amp, deterministic=args.deterministic)
    with tempfile.TemporaryDirectory() as folder, joined(device, execution):
        size = (args.width, args.height)
        n_bytes = write_images(Path(folder), args.images, size, np.random.default_rng(args.seed))
        space = image_folder_space(get_space(args.space), Path(folder))
        side = args.side or space.resolutions[-1]
        splits = load_splits(space, Path(folder))
        rates = compared(Path(folder), splits, side, args, device)
        between = course(Path(folder), splits, space.resolutions, args, device)
        steps = dict(step_rates(space, side, args.batch_size, args.steps, device, execution)) if args.steps else {}
    setting = {"device": str(device), "batch": args.batch_size, "side": side, "workers": n_workers(), "size": size}
    setting |= {"bytes": n_bytes, "deterministic": args.deterministic, "amp": args.amp}
    result = {"machine": describe(), "setting": setting, "pipelines": rates, "course": between, "steps": steps}
    print(json.dumps(result)) if args.json else show(result)


def write_images(folder: Path, n: int, size: tuple[int, int], rng: np.random.Generator) -> int:
    """Write `n` training images and an eighth as many test images, in classes. Returns the mean number of bytes."""
    sizes = []
    for part, n_part in (("train", n), ("val", max(CLASSES, n // 8))):
        for i in range(n_part):
            file = folder / part / f"class{i % CLASSES}" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(colours.resize(size, Image.Resampling.BICUBIC), np.float32)
            noise = rng.normal(0, 12, (*smooth.shape[:2], 1)).astype(np.float32)
            Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(file, quality=QUALITY)
            sizes.append(file.stat().st_size)
    return round(statistics.mean(sizes))


def bare_loader(folder: Path, splits: Splits, side: int, batch_size: int, pinned: bool) -> DataLoader:
    """The training images of the splits in torchvision's pipeline."""
    steps = [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    normalise = transforms.Normalize(PHOTOS.mean, PHOTOS.std)
    images = ImageFolder(str(folder / "train"), transforms.Compose([*steps, normalise]))
    own = {"num_workers": n_workers(), "persistent_workers": True, "pin_memory": pinned}
    return DataLoader(Subset(images, splits.train.indices), batch_size, shuffle=True, **own)


def compared(folder: Path, splits: Splits, side: int, args: Any, device: torch.device) -> dict[str, dict[str, float]]:
    """Medians of both pipelines over passes in turns, and the ratio of ours to the bare one."""
    bare = bare_loader(folder, splits, side, args.batch_size, device.type == "cuda")
    ours = make_loader(splits.train, args.batch_size, shuffle=True, sides=(side,), device=device)
    pipelines = {"bare torchvision": on_device(bare, device), "ours": on_device(ours, device)}
    passes: dict[str, list[Pass]] = {name: [] for name in pipelines}
    for i in range(args.epochs + 1):  # the first one starts the processes
        for name, batches in pipelines.items():
            done = timed_pass(batches)
            if i:
                passes[name].append(done)
    medians = {
        name: {
            "images_s": statistics.median(one.images / one.seconds for one in own),
            "images_s_core": statistics.median(one.images / one.cpu for one in own),
        }
        for name, own in passes.items()
    }
    ratio = {key: medians["ours"][key] / medians["bare torchvision"][key] for key in medians["ours"]}
    return {**medians, "ratio": ratio}


def on_device(loader: Iterable[Any], device: torch.device) -> Callable[[], Iterator[Any]]:
    """A function that gives the batches of an epoch, on the device."""
    return lambda: ((to_device(images, device), labels) for images, labels in loader)


def timed_pass(batches: Callable[[], Iterator[Any]]) -> Pass:
    """Take all batches and do nothing with them."""
    started, computed = time.perf_counter(), cpu_seconds()
    images = sum(len(labels) for _, labels in batches())
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Pass(images=images, seconds=time.perf_counter() - started, cpu=cpu_seconds() - computed)


def cpu_seconds() -> float:
    """Seconds that this process and the processes that it has started have computed."""
    children = (Path(f"/proc/{child.pid}/stat").read_text() for child in multiprocessing.active_children())
    fields = (line.rsplit(")", 1)[1].split() for line in children)
    return time.process_time() + sum(int(field[11]) + int(field[12]) for field in fields) / TICKS


def course(folder: Path, splits: Splits, sides: tuple[int, ...], args: Any, device: torch.device) -> dict[str, Any]:
    """Seconds of the course of a training without its steps, and the processes that read for it."""
    pinned, batch = device.type == "cuda", args.batch_size

    def bare_central(part: str, images: list[int], side: int, size: int) -> DataLoader:
        central = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
        files = ImageFolder(str(folder / part), transforms.Compose(central))
        return DataLoader(Subset(files, images), size, num_workers=n_workers(), pin_memory=pinned)

    few = splits.train.indices[:RECALIBRATED]
    ways = {
        "bare torchvision": (
            lambda: bare_loader(folder, splits, sides[-1], batch, pinned),
            lambda side: bare_central("train", few, side, RECALIBRATION_BATCH),
            lambda side: bare_central("train", splits.val.indices, side, EVALUATION_BATCH),
        ),
        "ours": (
            lambda: make_loader(splits.train, batch, shuffle=True, sides=sides[-1:], device=device),
            lambda side: recalibration_batches(splits, (side,), device, RECALIBRATED),
            lambda side: make_loader(splits.val, EVALUATION_BATCH, sides=(side,), device=device),
        ),
    }
    found = {}
    for name, (train, recalibration, evaluation) in ways.items():
        end_workers()
        started, processes = time.perf_counter(), set()
        for _ in range(args.phases):
            for loader in (
                train(),
                *(part(side) for side in (sides[0], sides[-1]) for part in (recalibration, evaluation)),
            ):
                for _ in loader:
                    processes |= {child.pid for child in multiprocessing.active_children()}
        found[name] = {"seconds": time.perf_counter() - started, "processes": len(processes)}
    return found


def step_rates(
    space: SearchSpace, side: int, batch_size: int, n_steps: int, device: torch.device, execution: Execution
) -> Iterator[tuple[str, float]]:
    """Images a second of training steps of the largest and the smallest subnet, in median."""
    images = to_device(torch.randn(batch_size, space.in_channels, side, side), device)
    batch = [(images, torch.randint(space.n_classes, (batch_size,)))]
    for name, subnet in (("largest", largest_subnet(space)), ("smallest", smallest_subnet(space))):
        supernet = DynamicProxylessNASNets(space=space)
        supernet.activate(subnet)
        net = supernet.get_active_subnet().to(device)
        training = Training(net, TrainConfig(epochs=1, lr=1e-3), device, execution=execution)
        seconds = []
        for _ in range(n_steps + 1):  # the first one prepares the convolutions
            started = time.perf_counter()
            train_one_epoch(training, batch, 0)  # ends with its loss, so after all of it
            seconds.append(time.perf_counter() - started)
        yield name, batch_size / statistics.median(seconds[1:])


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    rates, cores = result["pipelines"], n_cores()
    print(result["machine"], "\n", result["setting"], sep="", end="\n\n")
    rows = [(name, f"{row['images_s']:.1f}", f"{row['images_s_core']:.1f}") for name, row in rates.items()]
    rows[-1] = ("ratio", *(f"{rates['ratio'][key]:.2f}" for key in ("images_s", "images_s_core")))
    print(markdown(("pipeline", "images/s", "images/s a core"), rows))
    print(f"\nat least {GOAL} of the bare pipeline's images a core\n")
    if result["steps"]:
        ours = rates["ours"]["images_s_core"] * cores
        rows = [(name, f"{rate:.1f}", f"{ours / rate:.2f}") for name, rate in result["steps"].items()]
        print(markdown(("step", "images/s", f"the loader on {cores} cores, multiples"), rows), end="\n\n")
    rows = [(name, f"{row['seconds']:.2f}", row["processes"]) for name, row in result["course"].items()]
    print(markdown(("course of a training without steps", "seconds", "processes"), rows))


if __name__ == "__main__":
    run(main)
