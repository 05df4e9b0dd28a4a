"""Train a supernet from nothing by progressive shrinking.

Writes models/SPACE/supernet.pt; a run that was killed continues with the same command. Next: search.py --prepare acc.

  torchrun --nproc_per_node=8 train.py --space apq-imagenet --data DIR --amp     on all GPUs of a machine
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apq.cli import Parser, add_common_flags, add_execution_flags, at_least, run, table
from apq.device import resolve_device
from apq.errors import UserError
from apq.files import check_writable, write_json
from apq.model_folder import ModelFolder
from apq.presets import get_space
from apq.space import SearchSpace, space_to_dict
from dataset import load_splits
from dataset.imagenet import image_folder_space, tell_unreadable
from elastic_nn.networks.supernet_file import save_supernet
from elastic_nn.training.distributed import check_agreement, processes
from elastic_nn.training.engine import Execution
from elastic_nn.training.progressive_shrinking import train_supernet
from elastic_nn.training.recipes import RECIPES, get_recipe, with_batch_size


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="digits", help="a preset, or the path of a space in a .json file")
    parser.add_argument("--data", type=Path, help="image folder (train/CLASS, val/CLASS); digits and glyphs need none")
    parser.add_argument("--recipe", help=f"training recipe: {', '.join(RECIPES)} (default: the space's own)")
    parser.add_argument("--out", type=Path, help="folder of the result (default: models/SPACE)")
    parser.add_argument("--overwrite", action="store_true", help="replace a supernet that exists")
    parser.add_argument(
        "--batch_size",
        type=at_least(2),
        help="images a step, of all processes (default: the recipe's)",
    )
    add_execution_flags(parser)
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    with processes(device) as share:
        execution = Execution(amp=args.amp, accumulate=args.accumulate, share=share)
        train(args, device, execution)


def train(args: argparse.Namespace, device: torch.device, execution: Execution) -> None:
    """Check, train, save, print."""
    space: SearchSpace = get_space(args.space)
    if args.data:
        space = image_folder_space(space, args.data)
    folder = ModelFolder(args.out or Path("models") / space.name)
    if folder.supernet.exists() and not args.overwrite:
        raise UserError(f"{folder.supernet} exists; choose another --out or give --overwrite")
    check_writable(folder.path)
    splits, recipe = load_splits(space, args.data), get_recipe(args.recipe, space)
    if args.batch_size:
        recipe = with_batch_size(recipe, args.batch_size)
    check_agreement(
        {
            "space": space_to_dict(space),
            "recipe": asdict(recipe),
            "seed": args.seed,
            "images": splits.source,
            "execution": execution.asked(),
            "ema": args.ema,
        },
        execution.share,
    )
    if execution.main:
        print(f"space {space.name}, recipe {recipe.name}", file=sys.stderr)
    net, records = train_supernet(
        space,
        splits,
        recipe,
        seed=args.seed,
        device=device,
        state_file=folder.supernet_state,
        execution=execution,
        ema=args.ema,
        log=partial(log, execution),
    )
    if not execution.main:
        return
    tell_unreadable(splits)
    write_json(folder.training, {"space": space.name, "recipe": recipe.name, "seed": args.seed, "phases": records})
    # The supernet comes last: it says that all is there.
    save_supernet(folder.supernet, net.cpu(), recipe.name, splits.source, seed=args.seed, records=records)
    folder.supernet_state.unlink(missing_ok=True)
    if args.json:
        print(json.dumps({"supernet": str(folder.supernet), "phases": records}))
        return
    rows = [(r["phase"], f"{r['loss']:.3f}", f"{r['largest_top1']:.2%}", f"{r['smallest_top1']:.2%}") for r in records]
    print(table([("phase", "loss", "largest", "smallest"), *rows]))
    print(f"validation top-1 after each phase; supernet in {folder.supernet}")


def log(execution: Execution, record: dict[str, Any]) -> None:
    """One line a phase on stderr."""
    if execution.main:
        print(f"phase {record['phase']}: loss {record['loss']:.3f}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
