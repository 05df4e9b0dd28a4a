"""Does a supernet of few bits learn better from one of more bits (bit inheritance) than from the float one (QAT)?

For each seed a float supernet is trained. Quantization-aware training from it gives supernets of 5, 4, 3 and 2 bits.
Inheritance starts from the one of 5 bits: 4 bits start from 5, 3 from 4, 2 from 3. All quantized supernets have the
same recipe, and the largest network of the supernet that they started from is the teacher. So with inheritance the
quantized epochs add up: 12 at 4 bits, 18 at 3, 24 at 2. Quantization-aware training has 6.

Supernets and records are kept in --out, so a killed run continues. Runs with other --seeds may share the machine.
Another space or other constants need another --out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from apq.bit_widths import at_bits
from apq.cli import Parser, run
from apq.device import resolve_device
from apq.files import Record, read_json
from apq.model_folder import ModelFolder
from apq.presets import get_space
from apq.space import SearchSpace
from benchmarks.markdown import markdown
from benchmarks.supernets import trained_once
from dataset import load_splits
from dataset.splits import Splits
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.quantizers import FLOAT, LSQ
from elastic_nn.training.progressive_shrinking import SupernetPlan
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from report.plots import plot_top1


@dataclass(frozen=True)
class Task:
    """One supernet: its bits (None: float), and the name of the supernet that it starts from."""

    name: str
    bits: int | None = None
    start: str | None = None


TASKS = (  # a supernet comes after the one that it starts from
    Task("float"),
    Task("qat-5", 5, "float"),
    Task("qat-4", 4, "float"),
    Task("inherited-4", 4, "qat-5"),
    Task("qat-3", 3, "float"),
    Task("inherited-3", 3, "inherited-4"),
    Task("qat-2", 2, "float"),
    Task("inherited-2", 2, "inherited-3"),
)
# Shorter than the space's own recipes, because every seed trains eight supernets.
FLOAT_EPOCHS, EPOCHS, EPOCH_IMAGES = (10, 8), 6, 5000


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="oqa-mbv2-glyphs", help="an OQA space")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--out", type=Path, default=Path("exps/oqa_training"), help="folder of supernets and records")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    space = get_space(args.space)
    splits = load_splits(space)
    for seed, task in tqdm([(seed, task) for seed in args.seeds for task in TASKS], disable=None):
        train(task, space, splits, seed, args.out / str(seed), device)
    print_table(args)


def recipe_of(task: Task, space: SearchSpace) -> Recipe:
    """The recipe of the space's float supernet, that of 2 bits for all others, with fewer epochs and images."""
    recipe = get_recipe(None, at_bits(space, 2), in_float=task.bits is None)
    epochs = FLOAT_EPOCHS if task.bits is None else (EPOCHS,)
    phases = tuple(
        replace(phase, train=replace(phase.train, epochs=n), epoch_images=EPOCH_IMAGES * (1 if phase.sandwich else 2))
        for phase, n in zip(recipe.phases, epochs, strict=True)
    )
    return replace(recipe, phases=phases)


def train(task: Task, space: SearchSpace, splits: Splits, seed: int, folder: Path, device: torch.device) -> None:
    """Train one supernet unless its file exists."""
    own = ModelFolder(folder / task.name)
    if own.supernet.exists():
        return
    start = None if task.start is None else load_supernet(ModelFolder(folder / task.start).supernet)[0]
    plan = SupernetPlan(
        space=space if task.bits is None else at_bits(space, task.bits),
        recipe=recipe_of(task, space),
        scheme=FLOAT if task.bits is None else LSQ,
        start=start,
    )
    trained_once(own, plan, Session(splits=splits, device=device, seed=seed))


def phases_of(folder: ModelFolder) -> list[Record]:
    """The records of a supernet's phases; the file of earlier versions has nothing else."""
    found = read_json(folder.training)
    return found if isinstance(found, list) else found["phases"]


def print_table(args: Any) -> None:
    """Print validation top-1: of the largest subnet before and after the first epoch and after the last, on part of the
    images; then of the largest and the smallest at the end, on all images."""
    rows, found = [], {}
    for seed in args.seeds:
        for task in TASKS:
            (*_, last) = phases_of(ModelFolder(args.out / str(seed) / task.name))
            scores = [epoch["largest_top1"] for epoch in last["epochs"]]
            ends = [scores[0], scores[1]] if task.start else [None, scores[0]]
            figures = [*ends, scores[-1], last["largest_top1"], last["smallest_top1"]]
            found[seed, task.name] = figures
            rows.append((str(seed), task.name, task.start or "", *map(percent, figures)))
    means = [
        ("mean", task.name, task.start or "", *map(percent, np.mean([found[s, task.name] for s in args.seeds], axis=0)))
        for task in TASKS
        if task.start
    ]
    titles = ("seed", "supernet", "from", "start", "one epoch", "end", "largest, all images", "smallest, all images")
    lines = {}
    for task in TASKS:
        if task.name.startswith(("qat", "inherited")) and task.bits < 5:
            of = [phases_of(ModelFolder(args.out / str(s) / task.name))[-1]["epochs"] for s in args.seeds]
            top1 = np.mean([[epoch["largest_top1"] for epoch in epochs] for epochs in of], axis=0)
            lines[f"{task.name.split('-')[0]}, {task.bits} bits"] = (range(len(top1)), top1)
    plot_top1(lines, args.out / "training.png", xlabel="epoch")
    print(markdown(titles, [*rows, *means]))


def percent(share: float | None) -> str:
    """As a percentage."""
    return "" if share is None else f"{100 * share:.2f}"


if __name__ == "__main__":
    run(main)
