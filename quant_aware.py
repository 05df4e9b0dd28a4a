"""Quantization-aware finetune of the subnet that a search found, from the supernet's weights.

Calibrates the quantizers, recalibrates BatchNorm, trains, keeps the epoch with the best validation accuracy in
checkpoint/model_best.pth.tar. A run that was killed continues with the same command. Next: test.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from apq.checkpoint import digest
from apq.cli import Parser, add_common_flags, add_execution_flags, run
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import get_experiment
from apq.files import check_writable, write_json
from apq.model_folder import ModelFolder
from apq.subnet import spec_of
from dataset import check_classes, load_splits
from dataset.imagenet import tell_unreadable
from elastic_nn.networks.subnet_file import save_subnet
from elastic_nn.networks.supernet_file import load_quantized_supernet
from elastic_nn.training.distributed import check_agreement, processes
from elastic_nn.training.engine import Execution
from elastic_nn.training.finetune import finetune, quantized_subnet
from elastic_nn.training.recipes import RECIPES, get_recipe


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--exp_name", default="test", help="name of the experiment: its folder is exps/NAME")
    parser.add_argument("--exp_dir", type=Path, help="folder of the experiment (default: exps/EXP_NAME)")
    parser.add_argument("--supernet", type=Path, help="file of the supernet (default: the one beside the predictor)")
    parser.add_argument("--data", type=Path, help="image folder (train/CLASS, val/CLASS); digits and glyphs need none")
    parser.add_argument("--recipe", help=f"training recipe: {', '.join(RECIPES)} (default: the supernet's)")
    parser.add_argument("--epochs", type=int, help="epochs of training (default: the recipe's)")
    parser.add_argument("--lr", type=float, help="learning rate at the start of the cosine (default: the recipe's)")
    parser.add_argument("--batch_size", type=int, help="images a step (default: the recipe's)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finetune that is finished")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: pays on a GPU")
    add_execution_flags(parser)
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    with processes(device) as share:
        finetune_experiment(args, device, Execution(amp=args.amp, accumulate=args.accumulate, share=share))


def finetune_experiment(args: argparse.Namespace, device: torch.device, execution: Execution) -> None:
    """Check, calibrate, train, save, print."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    space = experiment.load_space()
    subnet = experiment.load_subnet(space)
    if experiment.acc.exists() and not args.overwrite:
        raise UserError(f"{experiment.path} is finetuned already; give --overwrite to do it again")
    check_writable(experiment.path)
    supernet_file = args.supernet or ModelFolder(Path(experiment.load_config()["acc_predictor_dir"])).supernet
    supernet, facts = load_quantized_supernet(supernet_file, space)
    recipe = get_recipe(args.recipe or facts.recipe, space)
    given = {name: value for name in ("epochs", "lr", "batch_size") if (value := getattr(args, name)) is not None}
    config = replace(recipe.finetune, **given)
    splits = load_splits(space, args.data)
    check_classes(splits, facts.images, supernet_file)
    asked = {
        "subnet": spec_of(space, subnet),
        "train": asdict(config),
        "recalibration_images": recipe.recalibration_images,
        "seed": args.seed,
        "supernet": digest(supernet.state_dict()),
        "images": splits.source,
        "execution": execution.asked(),
        "ema": args.ema,
        "compile": args.compile,
    }
    check_agreement(asked, execution.share)
    torch.manual_seed(args.seed)
    net = quantized_subnet(supernet.to(device), subnet, splits, recipe.recalibration_images, device)
    if args.compile:
        net.compile()
    top1, weights = finetune(
        net,
        splits,
        config,
        seed=args.seed,
        device=device,
        side=subnet.resolution,
        describe="finetune",
        state_file=experiment.last_checkpoint,
        asked=asked,
        restart=args.overwrite,
        execution=execution,
        ema=args.ema,
    )
    if not execution.main:
        return
    tell_unreadable(splits)
    experiment.acc.unlink(missing_ok=True)  # it says that the checkpoint beside it is finished
    facts = {"train": asdict(config), "seed": args.seed, "val_top1": top1}
    save_subnet(experiment.best_checkpoint, space, subnet, weights, images=splits.source, **facts)
    write_json(experiment.acc, [top1])
    experiment.last_checkpoint.unlink(missing_ok=True)
    if args.json:
        print(json.dumps({"exp_dir": str(experiment.path), "val_top1": top1, "epochs": config.epochs}))
    else:
        print(f"best validation top-1 {top1:.2%} in {config.epochs} epochs; weights in {experiment.best_checkpoint}")


if __name__ == "__main__":
    run(main)
