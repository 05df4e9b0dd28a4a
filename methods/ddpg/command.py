"""Choose the bits of each layer of one trained network within a budget, by a reinforcement-learning agent (HAQ).

  search.py --mode ddpg --model NAME --quantizer linear --exp_name EXP     writes exps/EXP. Next: quant_aware.py
  search.py --mode ddpg --model NAME --policy FILE --exp_name EXP          take the bits of a file instead

A search that was killed continues with the same command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from apq.cli import Parser
from apq.errors import UserError
from apq.layers import FIXED_BITS
from methods.search.flags import (
    BIT_QUANTITIES,
    add_agent_flags,
    add_bit_flags,
    add_budget_flags,
    add_image_flags,
    mode_parser,
)


def build_parser() -> Parser:
    parser = mode_parser("ddpg", __doc__)
    parser.add_argument("--model", metavar="NAME|exps/NAME", help="network of models/NAME, or that of an experiment")
    parser.add_argument("--weights", type=Path, help="file of --model's weights (default: models/NAME/model.pt)")
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE[#/POINTER]",
        help="bits to take instead of searching: a JSON list, HAQ's strategy, or what the pointer leads to in the file",
    )
    add_budget_flags(parser, quantities=BIT_QUANTITIES, default=None)
    add_image_flags(parser)
    parser.add_argument(
        "--keep_ends",
        action=argparse.BooleanOptionalAction,
        help="leave first and last layer at 8 bits (default: yes, of k-means no, as published)",
    )
    parser.add_argument(
        "--image_bits",
        type=int,
        choices=(7, 8),
        default=FIXED_BITS,
        help="bits that the first layer's input is priced at (7: as HAQ's code does)",
    )
    add_bit_flags(
        parser,
        ratio="budget, share of the 8-bit cost, of k-means of the 32-bit weights "
        "(default: 0.6, of k-means 0.1; or give --constraint)",
        fewest="2, of k-means 1",
        most="8",
    )
    add_agent_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Search the bits of a network, or take those of a file; record and print them."""
    if args.model is None:
        raise UserError("--mode ddpg needs --model, the network whose bits to choose")
    from methods.ddpg.search import search

    search(args)
