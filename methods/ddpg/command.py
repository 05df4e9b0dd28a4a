"""Choose the bits of each layer of one trained network within a budget, by a reinforcement-learning agent (HAQ).

  search.py --mode ddpg --model NAME --quantizer linear --exp_name EXP     writes exps/EXP. Next: quant_aware.py
  search.py --mode ddpg --model NAME --policy FILE --exp_name EXP          take the bits from a file instead

A killed search continues with the same command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from apq.cli import Parser, add_deterministic_flag
from methods.search.flags import add_agent_flags, mode_parser
from methods.search.policy_flags import add_finetune_flags, add_policy_flags, check_model_is_given
from methods.search.settings import STEPS


def build_parser() -> Parser:
    parser = mode_parser("ddpg", __doc__)
    add_policy_flags(parser)
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE[#/POINTER]",
        help="take these bits instead of searching: a JSON file with a list (HAQ's strategy), or a pointer to one",
    )
    group = parser.add_argument_group("episodes")
    add_finetune_flags(group)
    group.add_argument("--use_top5", action="store_true", help="reward top-5 instead of top-1")
    group.add_argument(
        "--steps",
        choices=STEPS,
        default=STEPS[0],
        help="operands that the agent acts on: those whose bits are chosen, or as in HAQ's code all",
    )
    add_agent_flags(parser)
    add_deterministic_flag(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Search the bits of a network, or take them from a file; record and print them."""
    check_model_is_given(args, "ddpg")
    from methods.ddpg.search import search

    search(args)
