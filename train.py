"""Train a supernet by progressive shrinking or the sandwich rule, or with --model another network by name.

Writes models/SPACE/supernet.pt or models/NAME/model.pt; a run that was killed continues with the same command. Next,
for a float supernet: search.py --prepare acc; for one of mixed precision: --prepare acc_quant. A space of one
bit-width throughout, as oqa-mbv2, is trained quantized, with learned step sizes; its supernet of fewer bits starts from
one of more. A space that chooses the bits of every convolution, as qfa-mbv3, is trained in mixed precision
(BatchQuant) from a float supernet.

  torchrun --nproc_per_node=8 train.py --space apq-imagenet --data DIR --amp     on all GPUs of a machine
  train.py --model mobilenet_v2_small                                            a small network on glyphs
  train.py --space oqa-mbv2-glyphs                                               a supernet at 4 bits, then at 3:
  train.py --space oqa-mbv2-glyphs-3bit --start_from models/oqa-mbv2-glyphs
  train.py --space qfa-mbv3-glyphs --quantizer float                             a float supernet, then mixed precision:
  train.py --space qfa-mbv3-glyphs --start_from models/qfa-mbv3-glyphs-float
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apq.bit_widths import bits_throughout
from apq.checkpoint import digest
from apq.cli import Parser, add_common_flags, add_execution_flags, at_least, run, table
from apq.device import resolve_device
from apq.errors import UserError
from apq.files import check_writable, write_json
from apq.model import ModelSpec, model_to_dict
from apq.model_folder import ModelFolder
from apq.presets import APQ_IMAGENET, get_space
from apq.space import SearchSpace, space_to_dict
from dataset import check_classes, load_splits
from dataset.imagenet import image_folder_model, image_folder_space, tell_unreadable
from dataset.splits import Splits
from dataset.table import DATASETS
from elastic_nn.networks import DynamicProxylessNASNets
from elastic_nn.networks.model_file import save_model
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.networks.supernet_file import load_supernet, save_supernet
from elastic_nn.quantizers import BATCHQUANT, FLOAT, LSQ, MIXED, QuantScheme, scheme_named
from elastic_nn.training.distributed import check_agreement, processes
from elastic_nn.training.engine import Execution
from elastic_nn.training.finetune import finetune
from elastic_nn.training.inheritance import check_recipe, check_start
from elastic_nn.training.progressive_shrinking import train_supernet
from elastic_nn.training.recipe import TrainConfig, with_batch_size
from elastic_nn.training.recipes import RECIPES, get_recipe

OF_MODELS = ("images", "epochs", "lr")  # flags that a supernet does not have
OF_SUPERNETS = ("quantizer", "start_from")  # flags that a network by name does not have


def build_parser() -> Parser:
    parser = Parser(__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--space", help="a preset, or the path of a space in a .json file (default: digits)")
    kind.add_argument("--model", help="train this network instead: mobilenet_v2_small, any of torchvision, ...")
    parser.add_argument("--data", type=Path, help="image folder (train/CLASS, val/CLASS); digits and glyphs need none")
    parser.add_argument(
        "--images",
        choices=tuple(DATASETS),
        help="with --model: what it is for (default: glyphs for NAME_small, else imagenet)",
    )
    parser.add_argument("--recipe", help=f"training recipe: {', '.join(RECIPES)} (default: the space's or images' own)")
    parser.add_argument(
        "--quantizer",
        choices=(FLOAT.name, LSQ.name, *MIXED),
        help="train the supernet in full precision, with learned steps, or in mixed precision by one of the others "
        "(default: lsq for spaces of one bit-width, batchquant for QFA's)",
    )
    parser.add_argument(
        "--start_from",
        type=Path,
        help="folder or file of a supernet of the same architectures: one of more bits hands down weights and steps, a "
        "float one its weights; its largest network teaches",
    )
    parser.add_argument("--epochs", type=int, help="with --model: epochs (default: those of the recipe's first phase)")
    parser.add_argument("--lr", type=float, help="with --model: learning rate at the start (default: the recipe's)")
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: models/SPACE, models/SPACE-float or models/NAME)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a supernet or a model that exists")
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
    if args.model is None and (odd := [name for name in OF_MODELS if getattr(args, name) is not None]):
        raise UserError(f"--{odd[0]} belongs to --model")
    if args.model is not None and (odd := [name for name in OF_SUPERNETS if getattr(args, name) is not None]):
        raise UserError(f"--{odd[0]} belongs to --space")
    device = resolve_device(args.device)
    with processes(device) as share:
        execution = Execution(amp=args.amp, accumulate=args.accumulate, share=share)
        (train if args.model is None else train_model)(args, device, execution)


def train(args: argparse.Namespace, device: torch.device, execution: Execution) -> None:
    """Check, train, save and print a supernet."""
    space: SearchSpace = get_space(args.space or "digits")
    if args.data:
        space = image_folder_space(space, args.data)
    usual = usual_scheme(space)
    scheme = usual if args.quantizer is None else scheme_named(args.quantizer)
    folder = ModelFolder(
        args.out or Path("models") / (space.name if scheme == usual else f"{space.name}-{scheme.name}")
    )
    if folder.supernet.exists() and not args.overwrite:
        raise UserError(f"{folder.supernet} exists; choose another --out or give --overwrite")
    check_writable(folder.path)
    splits, recipe = load_splits(space, args.data), get_recipe(args.recipe, space, in_float=scheme == FLOAT)
    if args.batch_size:
        recipe = with_batch_size(recipe, args.batch_size)
    start, start_facts = (None, {}) if args.start_from is None else load_start(args.start_from, splits)
    check_start(start, space, scheme)
    check_recipe(recipe, scheme, from_nothing=start is None)
    check_agreement(
        {
            "space": space_to_dict(space),
            "recipe": asdict(recipe),
            "scheme": scheme.name,
            "start": start_facts,
            "seed": args.seed,
            "images": splits.source,
            "execution": execution.asked(),
            "ema": args.ema,
        },
        execution.share,
    )
    if execution.main:
        print(f"space {space.name}, recipe {recipe.name}, quantizers {scheme.name}", file=sys.stderr)
    net, records = train_supernet(
        space,
        splits,
        recipe,
        seed=args.seed,
        device=device,
        state_file=folder.supernet_state,
        scheme=scheme,
        start=start,
        execution=execution,
        ema=args.ema,
        log=partial(log, execution),
    )
    if not execution.main:
        return
    tell_unreadable(splits)
    facts = {"seed": args.seed, **start_facts}
    write_json(folder.training, {"space": space.name, "recipe": recipe.name, **facts, "phases": records})
    # The supernet comes last: it says that all is there.
    save_supernet(folder.supernet, net.cpu(), recipe.name, splits.source, records=records, **facts)
    folder.supernet_state.unlink(missing_ok=True)
    if args.json:
        print(json.dumps({"supernet": str(folder.supernet), "phases": records}))
        return
    rows = [(r["phase"], f"{r['loss']:.3f}", f"{r['largest_top1']:.2%}", f"{r['smallest_top1']:.2%}") for r in records]
    print(table([("phase", "loss", "largest", "smallest"), *rows]))
    print(f"validation top-1 after each phase; supernet in {folder.supernet}")


def usual_scheme(space: SearchSpace) -> QuantScheme:
    """How a supernet of the space is quantized unless told otherwise."""
    if space.shared_operands:  # the bits of every convolution are chosen apart
        return BATCHQUANT
    return FLOAT if bits_throughout(space) is None else LSQ


def load_start(given: Path, splits: Splits) -> tuple[DynamicProxylessNASNets, dict[str, Any]]:
    """The supernet to start from, and what the new one's files say of it."""
    file = ModelFolder(given).supernet if given.is_dir() else given
    start, origin = load_supernet(file)
    check_classes(splits, origin.images, file)
    return start, {"started_from": {"file": str(file), "weights": digest(start.state_dict())}}


def train_model(args: argparse.Namespace, device: torch.device, execution: Execution) -> None:
    """Check, train, save and print a network by name."""
    spec, recipe, config = model_plan(args)
    folder = ModelFolder(args.out or Path("models") / args.model)
    if folder.model.exists() and not args.overwrite:
        raise UserError(f"{folder.model} exists; choose another --out or give --overwrite")
    torch.manual_seed(args.seed)
    net = build_model(spec).to(device)
    splits = load_splits(spec, args.data)
    check_writable(folder.path)
    asked = {
        "model": model_to_dict(spec),
        "train": asdict(config),
        "seed": args.seed,
        "images": splits.source,
        "execution": execution.asked(),
        "ema": args.ema,
    }
    check_agreement(asked, execution.share)
    if execution.main:
        print(f"model {spec.name}, images {spec.dataset}, recipe {recipe}", file=sys.stderr)
    top1, weights = finetune(
        net,
        splits,
        config,
        seed=args.seed,
        device=device,
        side=spec.resolution,
        describe="training",
        state_file=folder.model_state,
        asked=asked,
        restart=args.overwrite,
        execution=execution,
        ema=args.ema,
    )
    if not execution.main:
        return
    tell_unreadable(splits)
    facts = {"recipe": recipe, "train": asdict(config), "seed": args.seed, "val_top1": top1}
    save_model(folder.model, spec, weights, splits.source, **facts)
    folder.model_state.unlink(missing_ok=True)
    if args.json:
        print(json.dumps({"model": str(folder.model), "val_top1": top1, "epochs": config.epochs}))
    else:
        print(f"best validation top-1 {top1:.2%} in {config.epochs} epochs; weights in {folder.model}")


def model_plan(args: argparse.Namespace) -> tuple[ModelSpec, str, TrainConfig]:
    """What is trained, the name of the recipe, and its first phase with what the flags change."""
    if args.data and args.images not in (None, "imagenet"):
        raise UserError(f"--data brings its own images: leave --images {args.images} out")
    preset = named_model(args.model, "imagenet" if args.data else args.images)
    spec = image_folder_model(preset, args.data) if args.data else preset
    # A folder of as many classes as ImageNet is taken for it, as with --space; another has no recipe of its own.
    own = APQ_IMAGENET.recipe if spec == preset and spec.dataset == APQ_IMAGENET.dataset else None
    recipe = get_recipe(args.recipe or own, spec)
    given = {name: value for name in ("epochs", "lr", "batch_size") if (value := getattr(args, name)) is not None}
    return spec, recipe.name, replace(recipe.phases[0].train, **given)


def log(execution: Execution, record: dict[str, Any]) -> None:
    """One line a phase on stderr."""
    if execution.main:
        print(f"phase {record['phase']}: loss {record['loss']:.3f}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
