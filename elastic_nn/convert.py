"""Write a supernet of published code as one of ours, or one of ours as published code does.

A published supernet does not name its space. It is found from its keys and shapes, but for OQA's, whose bits are not in
the file: give --space, or the published name of the file, which ends with them (_b4). One of ours becomes a file with
the weights under "state_dict".

  python -m elastic_nn.convert ofa_mbv3_d234_e346_k357_w1.2 --out models/ofa/supernet.pt
  python -m elastic_nn.convert oqa.pth --space oqa-mbv3-2bit --out models/oqa-mbv3-2bit/supernet.pt
  python -m elastic_nn.convert models/mine/supernet.pt --out mine.pth
"""

from __future__ import annotations

import json
from pathlib import Path

from apq.cli import Parser, add_common_flags, run
from apq.errors import UserError
from apq.files import check_new
from apq.presets import get_space

NAME = "python -m elastic_nn.convert"


def build_parser() -> Parser:
    parser = Parser(__doc__, prog=NAME)
    parser.add_argument("file", type=Path, help="a supernet, ours or in a published layout")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--space", help="space of a published supernet: a preset, or a .json file (default: found)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    add_common_flags(parser, seed=False, device=False)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_new(args.out, args.overwrite)
    space = None if args.space is None else get_space(args.space)
    # Heavy imports come after parsing: --help and a mistyped flag answer at once.
    from apq.checkpoint import load_checkpoint, save_checkpoint
    from elastic_nn.networks.supernet_file import load_supernet, save_supernet

    ours = "space" in load_checkpoint(args.file)
    if ours and space is not None:
        raise UserError(f"{args.file} records its space: --space belongs to published supernets")
    net, _ = load_supernet(args.file, space)
    if ours:
        save_checkpoint(args.out, {"state_dict": net.published_state_dict()})
    else:
        save_supernet(args.out, net, None, None)
    facts = {"space": net.space.name, "quantizers": net.scheme.name, "file": str(args.out)}
    if args.json:
        print(json.dumps({**facts, "published": ours}))
    else:
        form = "in the published layout" if ours else "as one of ours"
        print(f"{args.out}: supernet of space {net.space.name}, quantizers {net.scheme.name}, {form}")


if __name__ == "__main__":
    run(main, NAME, alone=True)
