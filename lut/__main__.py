"""Write the cost table of a space: latency in ms and energy in mJ of every layer that it can run, at batch 1."""

from __future__ import annotations

import json
import time
from pathlib import Path

from apq.cli import Parser, add_common_flags, run
from apq.files import write_json
from apq.presets import get_space
from lut.accelerator import accelerator_from_json
from lut.table import build


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--space", default="digits", help="a preset, or the path of a space in a .json file")
    parser.add_argument("--out", type=Path, required=True, help="file to write, in the published JSON form")
    parser.add_argument("--config", type=Path, help="accelerator as a JSON file (default: the published BitFusion)")
    add_common_flags(parser, seed=False, device=False)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    space = get_space(args.space)
    accelerator = accelerator_from_json(args.config) if args.config else None
    started = time.perf_counter()
    table = build(space, accelerator)
    seconds = time.perf_counter() - started
    write_json(args.out, table)
    if args.json:
        print(json.dumps({"space": space.name, "file": str(args.out), "layers": len(table) - 2, "seconds": seconds}))
    else:
        print(f"{args.out}: {len(table) - 2} layers of space {space.name}, head and tail, in {seconds:.2f} s")


if __name__ == "__main__":
    run(main, "python -m lut")
