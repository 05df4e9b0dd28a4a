"""Make an image folder of some classes of a larger one, of symbolic links: nothing is copied.

  python -m dataset.subset --data FULL --out DIR --classes FILE     the classes in a file, one a line
  python -m dataset.subset --data FULL --out DIR --n 100            100 classes, drawn at random

DIR/train and DIR/val get the class folders, and DIR/classes.txt the names of all classes of FULL: the order of the
outputs of a network that was trained on FULL. HAQ searches bits on such a subset of ImageNet:
search.py --mode ddpg --data DIR --classes DIR/classes.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apq.cli import Parser, add_common_flags, at_least, run
from apq.errors import UserError, one_line
from apq.lock import locked
from apq.staging import put_in_place, stage, staged
from dataset.class_names import class_folders, read_class_names

PARTS = ("train", "val")
ALL_CLASSES = "classes.txt"  # in the new folder: the names of all classes of the larger one


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m dataset.subset")
    parser.add_argument("--data", type=Path, required=True, help="the larger folder: train/CLASS, val/CLASS")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--classes", type=Path, help="file that names the classes, one a line")
    chosen.add_argument("--n", type=at_least(1), help="number of classes, which --seed draws")
    add_common_flags(parser, device=False)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    known = class_folders(args.data / PARTS[0])
    if (others := class_folders(args.data / PARTS[1])) != known:
        apart = sorted({*known} ^ {*others})
        raise UserError(f"{args.data}: train and val have other classes, such as {apart[0]}")
    chosen = chosen_classes(args, known)
    link_classes(args.data, args.out, chosen, known)
    if args.json:
        print(json.dumps({"out": str(args.out), "classes": chosen}))
    else:
        print(f"{args.out}: links to {len(chosen)} of the {len(known)} classes of {args.data}")


def chosen_classes(args: argparse.Namespace, known: Sequence[str]) -> list[str]:
    """The classes that the flags name or draw, sorted. UserError where the larger folder lacks them."""
    if args.classes is None:
        if args.n > len(known):
            raise UserError(f"--n {args.n}: {args.data} has {len(known)} classes")
        return sorted(known[i] for i in np.random.default_rng(args.seed).choice(len(known), args.n, replace=False))
    chosen = sorted(read_class_names(args.classes))
    if missing := sorted({*chosen} - {*known}):
        raise UserError(f"{args.data} lacks {len(missing)} of the classes in {args.classes}, such as {missing[0]}")
    return chosen


def link_classes(full: Path, out: Path, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Make `out`, whole or not at all. UserError where it exists or cannot be written."""
    with locked(out):
        if os.path.lexists(out):
            raise UserError(f"{out} exists; choose another --out")
        for left in staged(out):  # by killed runs
            shutil.rmtree(left, ignore_errors=True)
        new = None
        try:
            new = stage(out)
            for part in PARTS:
                (new / part).mkdir()
                for name in chosen:
                    (new / part / name).symlink_to((full / part / name).resolve(), target_is_directory=True)
            (new / ALL_CLASSES).write_text("".join(f"{name}\n" for name in known), "utf-8", "surrogateescape")
            put_in_place(new, out)
        except BaseException as error:
            if new is not None:
                shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(f"cannot write {out}: {one_line(error)}") from error
            raise


if __name__ == "__main__":
    run(main, "python -m dataset.subset", alone=True)
