"""Train a supernet by progressive shrinking or the sandwich rule, or with --model another network by name.

Writes models/SPACE/supernet.pt or models/NAME/model.pt. A killed run continues with the same command. Next: search.py
--prepare acc for a float supernet, --prepare acc_quant for one of mixed precision. A space of one bit-width, such as
oqa-mbv2, is trained with learned steps (LSQ); at fewer bits its supernet starts from one of more bits. A space that
chooses the bits of every convolution, such as qfa-mbv3, is trained in mixed precision (BatchQuant), from a float
supernet.

  torchrun --nproc_per_node=8 train.py --space apq-imagenet --data DIR --amp     on all GPUs of a machine
  train.py --model mobilenet_v2_small                                            a small network on glyphs
  train.py --space oqa-mbv2-glyphs                                               a supernet of 4 bits, then of 3:
  train.py --space oqa-mbv2-glyphs-3bit --start_from models/oqa-mbv2-glyphs
  train.py --space qfa-mbv3-glyphs --quantizer float                             a float supernet, then mixed precision:
  train.py --space qfa-mbv3-glyphs --start_from models/qfa-mbv3-glyphs-float
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from apq.cli import MOST_BATCH, MOST_LR, Parser, above_0, add_common_flags, add_execution_flags, at_least, run, table
from apq.errors import UserError
from apq.policy import SUPERNET_QUANTIZERS
from dataset.table import DATASETS
from elastic_nn.training.recipes import RECIPES

if TYPE_CHECKING:
    import torch

    from elastic_nn.training.session import Execution

OF_MODELS = ("images", "epochs", "lr")  # flags of networks by name alone
OF_SUPERNETS = ("quantizer", "start_from")  # flags of supernets alone


def build_parser() -> Parser:
    parser = Parser(__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--space", help="a preset, or the path of a space in a .json file (default: digits)")
    kind.add_argument("--model", help="network to train instead, for example mobilenet_v2_small or one of torchvision")
    parser.add_argument("--data", type=Path, help="image folder (train/CLASS, val/CLASS); digits and glyphs need none")
    parser.add_argument(
        "--images",
        choices=tuple(DATASETS),
        help="with --model: data set to train on (default: glyphs for NAME_small, else imagenet)",
    )
    parser.add_argument("--recipe", help=f"training recipe: {', '.join(RECIPES)} (default: the space's or images' own)")
    parser.add_argument(
        "--quantizer",
        help=f"quantizers of the supernet: {', '.join(SUPERNET_QUANTIZERS)}, or one from APQ_PLUGINS (default: lsq for "
        "spaces of one bit-width, batchquant for QFA's, float for others)",
    )
    parser.add_argument(
        "--start_from",
        type=Path,
        help="folder or file of a supernet of the same architectures to start from: a float one passes on its weights, "
        "one of more bits also its steps; its largest subnet is the teacher (default for quantized ones: "
        "models/SPACE-float or, below 4 bits, that of a bit more; scratch: random weights)",
    )
    parser.add_argument(
        "--epochs", type=at_least(1), help="with --model: epochs (default: those of the recipe's first phase)"
    )
    parser.add_argument(
        "--lr", type=above_0(MOST_LR), help="with --model: learning rate at the start (default: the recipe's)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: models/SPACE, models/SPACE-float or models/NAME)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a supernet or model that exists")
    parser.add_argument(
        "--batch_size",
        type=at_least(2, MOST_BATCH),
        help="images a step, of all processes together (default: the recipe's)",
    )
    add_execution_flags(parser)
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    of_other, owner = (OF_MODELS, "model") if args.model is None else (OF_SUPERNETS, "space")
    if given := [name for name in of_other if getattr(args, name) is not None]:
        raise UserError(f"--{given[0]} belongs to --{owner}")
    # Heavy imports come after parsing: --help and a mistyped flag answer at once.
    from apq.device import resolve_device
    from elastic_nn.training.distributed import processes
    from elastic_nn.training.session import Execution

    how = {name: getattr(args, name) for name in ("amp", "accumulate", "ema", "deterministic")}
    device, asked = resolve_device(args.device), Execution(**how)
    with processes(device, asked) as execution:
        (train_supernet if args.model is None else train_network)(args, device, execution)


def train_supernet(args: argparse.Namespace, device: torch.device, execution: Execution) -> None:
    """Train the supernet of a space and print the accuracy after each phase."""
    from elastic_nn.training.supernet_training import SupernetRequest, train_space

    request = SupernetRequest(space=args.space or "digits", **given(args, "quantizer", "start_from"))
    file, records = train_space(request, device, execution)
    if not execution.main:
        return
    if args.json:
        print(json.dumps({"supernet": str(file), "phases": records}))
        return
    rows = [(r["phase"], f"{r['loss']:.3f}", f"{r['largest_top1']:.2%}", f"{r['smallest_top1']:.2%}") for r in records]
    print(table([("phase", "loss", "largest", "smallest"), *rows]))
    print(f"validation top-1 after each phase; supernet in {file}")


def train_network(args: argparse.Namespace, device: torch.device, execution: Execution) -> None:
    """Train a network by name and print its accuracy."""
    from elastic_nn.training.model_training import ModelRequest, train_model

    trained = train_model(ModelRequest(name=args.model, **given(args, *OF_MODELS)), device, execution)
    if not execution.main:
        return
    if args.json:
        print(json.dumps({"model": str(trained.file), "val_top1": trained.top1, "epochs": trained.epochs}))
    else:
        print(f"best validation top-1 {trained.top1:.2%} in {trained.epochs} epochs; weights in {trained.file}")


def given(args: argparse.Namespace, *own: str) -> dict[str, object]:
    """The values of the flags that both kinds of training have, and of the flags `own`."""
    return {name: getattr(args, name) for name in ("data", "recipe", "batch_size", "out", "overwrite", "seed", *own)}


if __name__ == "__main__":
    run(main)
