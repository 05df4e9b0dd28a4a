"""Choose the bits of each layer of one trained network within a budget, by a reinforcement-learning agent (HAQ).

  search.py --mode ddpg --model NAME --quantizer linear --exp_name EXP     writes exps/EXP. Next: quant_aware.py
  search.py --mode ddpg --model NAME --policy FILE --exp_name EXP          take the bits from a file instead

A killed search continues with the same command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from apq.cli import MOST_LR, Parser, above_0, add_deterministic_flag, at_least
from apq.errors import UserError
from apq.layers import FIXED_BITS
from elastic_nn.training.recipe import REWARDS
from methods.search.flags import (
    BIT_QUANTITIES,
    add_agent_flags,
    add_bit_flags,
    add_budget_flags,
    add_image_flags,
    mode_parser,
)
from methods.search.settings import STEPS


def build_parser() -> Parser:
    parser = mode_parser("ddpg", __doc__)
    parser.add_argument("--model", metavar="NAME|exps/NAME", help="network in models/NAME, or that of an experiment")
    parser.add_argument("--weights", type=Path, help="file of --model's weights (default: models/NAME/model.pt)")
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE[#/POINTER]",
        help="take these bits instead of searching: a JSON file with a list (HAQ's strategy), or a pointer to one",
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
    add_episode_flags(parser)
    add_agent_flags(parser)
    add_deterministic_flag(parser)
    return parser


def add_episode_flags(parser: Parser) -> None:
    """Add the flags of an episode's finetune and reward, under the names of HAQ's code where it has them."""
    group = parser.add_argument_group("episodes")
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
        help="images that an episode is rewarded on: those of validation, or those of its finetune, while it trains on "
        "them, as in HAQ's linear search (default: the recipe's)",
    )
    group.add_argument("--use_top5", action="store_true", help="reward top-5 instead of top-1")
    group.add_argument(
        "--steps",
        choices=STEPS,
        default=STEPS[0],
        help="operands that the agent acts on: those whose bits are chosen, or as in HAQ's code all",
    )
    group.add_argument(
        "--is_pruned",
        action="store_true",
        help="the network is pruned: weights that are zero stay zero, and have no size with k-means",
    )


def run(args: argparse.Namespace) -> None:
    """Search the bits of a network, or take them from a file; record and print them."""
    if args.model is None:
        raise UserError("--mode ddpg needs --model, the network whose bits to choose")
    from methods.ddpg.search import search

    search(args)
