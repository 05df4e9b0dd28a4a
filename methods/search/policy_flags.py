"""Flags of searches for the bits of one trained network, and the settings in them. This module does not import torch.

Names are those of HAQ's code where it has them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from apq.cli import MOST_LR, Parser, above_0, at_least
from apq.errors import UserError
from apq.layers import FIXED_BITS
from apq.policy import QUANTIZERS, PolicyQuantizer
from elastic_nn.training.recipe import REWARDS, Recipe, TrainConfig, adjusted
from methods.search.flags import BIT_QUANTITIES, add_bit_flags, add_budget_flags, add_image_flags
from methods.search.settings import BitSearch


def add_policy_flags(parser: Parser) -> None:
    """Add the flags of the network, its images, the budget and the bits."""
    parser.add_argument("--model", metavar="NAME|exps/NAME", help="network in models/NAME, or that of an experiment")
    parser.add_argument(
        "--weights",
        type=Path,
        help="file of --model's weights (default: models/NAME/model.pt, or those of an installed package)",
    )
    add_budget_flags(parser, quantities=BIT_QUANTITIES, default=None)
    add_image_flags(parser)
    parser.add_argument(
        "--classes",
        type=Path,
        help="file that names the classes of --model in the order of its outputs, one a line, so that --data may have "
        "some of them alone (default: those recorded with its weights)",
    )
    parser.add_argument(
        "--keep_ends",
        action=argparse.BooleanOptionalAction,
        help="keep the first and last layer at 8 bits (default: for linear quantizers, as published)",
    )
    parser.add_argument(
        "--image_bits",
        type=int,
        choices=(7, 8),
        default=FIXED_BITS,
        help="bits at which the first layer's input is priced (7: as in HAQ's code)",
    )
    add_bit_flags(
        parser,
        ratio="budget, instead of --constraint: a fraction of the 8-bit cost, or for k-means of the 32-bit size "
        "(default: 0.6, for k-means 0.1)",
        fewest="2, for k-means 1",
        most="8",
    )


def add_finetune_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of an episode's finetune and of the images that it is scored on."""
    group.add_argument(
        "--finetune_epoch", type=at_least(1), help="epochs of an episode's finetune (default: the recipe's)"
    )
    group.add_argument("--finetune_lr", type=above_0(MOST_LR), help="its learning rate (default: the recipe's)")
    group.add_argument(
        "--finetune_gamma", type=above_0(1), help="factor of the learning rate after each epoch (default: the recipe's)"
    )
    group.add_argument(
        "--reward",
        choices=REWARDS,
        help="images that an episode is scored on: those of validation, or those of its finetune, while it trains on "
        "them, as in HAQ's linear search (default: the recipe's)",
    )
    group.add_argument(
        "--is_pruned",
        action="store_true",
        help="the network is pruned: weights that are zero stay zero, and have no size with k-means",
    )


def check_model_is_given(args: argparse.Namespace, mode: str) -> None:
    """UserError where --model is left out."""
    if args.model is None:
        raise UserError(f"--mode {mode} needs --model, the network whose bits to choose")


def bit_search(args: argparse.Namespace, recipe: Recipe) -> BitSearch:
    """The settings in the flags of `add_policy_flags` and `add_finetune_flags`."""
    quantizer = QUANTIZERS[args.quantizer]
    if args.constraint is not None and args.preserve_ratio is not None:
        raise UserError("give one budget: --constraint or --preserve_ratio")
    if not quantizer.priced and (args.table is not None or args.image_bits != FIXED_BITS):
        raise UserError(f"{args.quantizer} weights have no cost on an accelerator: leave --table and --image_bits out")
    return BitSearch(
        quantizer=args.quantizer,
        quantity=args.type or ("latency" if quantizer.priced else "size"),
        ratio=quantizer.ratio if args.preserve_ratio is None else args.preserve_ratio,
        budget=args.constraint,
        min_bit=quantizer.fewest if args.min_bit is None else args.min_bit,
        max_bit=quantizer.most if args.max_bit is None else args.max_bit,
        keep_ends=keeps_ends(quantizer) if args.keep_ends is None else args.keep_ends,
        image_bits=args.image_bits,
        train_images=args.finetune_images or recipe.episode_images,
        val_images=args.val_images or recipe.episode_val_images,
        reward=args.reward or recipe.reward,
        is_pruned=args.is_pruned,
    )


def episode_finetune(args: argparse.Namespace, recipe: Recipe) -> TrainConfig:
    """The finetune of an episode: the recipe's, with the changes in the flags. --finetune_gamma is a schedule."""
    config = adjusted(recipe.episode, epochs=args.finetune_epoch, lr=args.finetune_lr)
    if args.finetune_gamma is None:
        return config
    return replace(config, schedule="exponential", gamma=args.finetune_gamma)


def keeps_ends(quantizer: PolicyQuantizer) -> bool:
    """Whether the first and last layer keep 8 bits by default: where activations are quantized too, as published."""
    return not quantizer.weights_only and FIXED_BITS in quantizer.bits
