"""Quantization-aware finetune of what a search found: a subnet of a supernet, or the policy of a given network.

Calibrates the quantizers, recalibrates BatchNorm, trains, keeps the epoch with the best validation accuracy in
checkpoint/model_best.pth.tar. A run that was killed continues with the same command. Next: test.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apq.checkpoint import digest
from apq.cli import Parser, add_common_flags, add_execution_flags, run
from apq.device import resolve_device
from apq.errors import UserError
from apq.experiment import Experiment, get_experiment
from apq.files import check_writable, write_json
from apq.policy import policy_to_dict
from apq.subnet import spec_of
from dataset import check_classes, load_splits
from dataset.imagenet import tell_unreadable
from dataset.splits import Splits
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.policy_file import save_policy_model
from elastic_nn.networks.subnet_file import save_subnet
from elastic_nn.training.distributed import check_agreement, processes
from elastic_nn.training.engine import Execution
from elastic_nn.training.finetune import finetune
from elastic_nn.training.found_subnet import load_found
from elastic_nn.training.policies import quantized_model
from elastic_nn.training.recipe import Recipe, TrainConfig
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is finetuned, on what and how: `asked` is all that it depends on, `save` writes its weights and facts."""

    net: nn.Module
    side: int
    splits: Splits
    train: TrainConfig
    asked: dict[str, Any]
    save: Callable[..., None]


def finetune_experiment(args: argparse.Namespace, device: torch.device, execution: Execution) -> None:
    """Check, calibrate, train, save, print."""
    experiment = get_experiment(args.exp_name, args.exp_dir)
    if experiment.acc.exists() and not args.overwrite:
        raise UserError(f"{experiment.path} has weights already, of a finetune or its search; give --overwrite")
    torch.manual_seed(args.seed)
    plan = (policy_plan if experiment.policy.exists() else subnet_plan)(args, experiment, device)
    check_writable(experiment.path)
    asked = {
        **plan.asked,
        "train": asdict(plan.train),
        "seed": args.seed,
        "images": plan.splits.source,
        "execution": execution.asked(),
        "ema": args.ema,
        "compile": args.compile,
    }
    check_agreement(asked, execution.share)
    if args.compile:
        plan.net.compile()
    top1, weights = finetune(
        plan.net,
        plan.splits,
        plan.train,
        seed=args.seed,
        device=device,
        side=plan.side,
        describe="finetune",
        state_file=experiment.last_checkpoint,
        asked=asked,
        restart=args.overwrite,
        execution=execution,
        ema=args.ema,
    )
    if not execution.main:
        return
    tell_unreadable(plan.splits)
    experiment.acc.unlink(missing_ok=True)  # it says that the checkpoint beside it is finished
    facts = {"train": asdict(plan.train), "seed": args.seed, "val_top1": top1}
    plan.save(state=weights, images=plan.splits.source, **facts)
    write_json(experiment.acc, [top1])
    experiment.last_checkpoint.unlink(missing_ok=True)
    if args.json:
        print(json.dumps({"exp_dir": str(experiment.path), "val_top1": top1, "epochs": plan.train.epochs}))
    else:
        print(
            f"best validation top-1 {top1:.2%} in {plan.train.epochs} epochs; weights in {experiment.best_checkpoint}"
        )


def subnet_plan(args: argparse.Namespace, experiment: Experiment, device: torch.device) -> Plan:
    """A found subnet, cut out of its supernet and calibrated."""
    found = load_found(experiment, supernet=args.supernet, data=args.data, recipe=args.recipe)
    space, subnet, weights = found.space, found.subnet, digest(found.supernet.state_dict())
    return Plan(
        net=found.network(device),
        side=subnet.resolution,
        splits=found.splits,
        train=train_config(args, found.recipe),
        asked={
            "subnet": spec_of(space, subnet),
            "recalibration_images": found.recipe.recalibration_images,
            "supernet": weights,
        },
        save=partial(save_subnet, experiment.best_checkpoint, space, subnet, scheme=found.supernet.scheme),
    )


def policy_plan(args: argparse.Namespace, experiment: Experiment, device: torch.device) -> Plan:
    """The given network of an experiment, quantized by its policy and calibrated."""
    if args.supernet is not None:
        raise UserError(f"{experiment.path} has its own float network: leave --supernet out")
    policy, layers = experiment.load_policy()
    net, spec, images = load_model(experiment.model)
    recipe = get_recipe(args.recipe or experiment.load_config()["recipe"], spec)
    train, splits = train_config(args, recipe), load_splits(spec, args.data)
    check_classes(splits, images, experiment.model)
    weights = digest(net.state_dict())
    signed = quantized_model(net, policy, splits, spec.resolution, recipe.recalibration_images, device)
    return Plan(
        net=net,
        side=spec.resolution,
        splits=splits,
        train=train,
        asked={
            "policy": policy_to_dict(policy, layers),
            "recalibration_images": recipe.recalibration_images,
            "model": weights,
        },
        save=partial(save_policy_model, experiment.best_checkpoint, spec, policy, layers, signed),
    )


def train_config(args: argparse.Namespace, recipe: Recipe) -> TrainConfig:
    """The recipe's finetune, with what the flags change."""
    given = {name: value for name in ("epochs", "lr", "batch_size") if (value := getattr(args, name)) is not None}
    return replace(recipe.finetune, **given)


if __name__ == "__main__":
    run(main)
