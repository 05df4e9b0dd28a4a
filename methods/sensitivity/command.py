"""Choose the bits of each layer of one trained network within a budget, by sensitivity and integer programming.

  search.py --mode sensitivity --model NAME --exp_name EXP     writes exps/EXP. Next: quant_aware.py

The increase of the loss is measured for every operand and number of bits, with that operand alone quantized. The bits
whose increases have the least sum within the budget are the result. A killed search continues with the same command.
"""

from __future__ import annotations

import argparse

from apq.cli import Parser, add_deterministic_flag, at_least
from methods.search.flags import mode_parser
from methods.search.policy_flags import add_finetune_flags, add_policy_flags, check_model_is_given
from methods.sensitivity.config import LOSS_IMAGES


def build_parser() -> Parser:
    parser = mode_parser("sensitivity", __doc__)
    add_policy_flags(parser)
    parser.add_argument(
        "--loss_images",
        type=at_least(2),
        default=LOSS_IMAGES,
        help=f"training images on which losses are measured (default: {LOSS_IMAGES})",
    )
    add_finetune_flags(parser.add_argument_group("the short finetune that scores the result, as an episode of ddpg"))
    add_deterministic_flag(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Choose the bits of a network; record and print them."""
    check_model_is_given(args, "sensitivity")
    from methods.sensitivity.search import search

    search(args)
