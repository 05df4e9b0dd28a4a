"""Search architecture, then channels, then bits, each within its own budget: the baseline of joint search.

  search.py --mode sequential --constraint 0.05 --exp_name NAME     writes exps/NAME. Next: quant_aware.py

A killed search continues with the same command.
"""

from __future__ import annotations

import argparse

from apq.cli import Parser, add_deterministic_flag, at_least
from apq.errors import UserError
from apq.policy import QUANTIZERS
from methods.search.flags import (
    BIT_QUANTITIES,
    add_agent_flags,
    add_bit_flags,
    add_budget_flags,
    add_evolution_flags,
    add_image_flags,
    add_models_flag,
    mode_parser,
)
from methods.sequential.config import Split


def build_parser() -> Parser:
    parser, split = mode_parser("sequential", __doc__), Split(constraint=1.0)
    add_budget_flags(parser, quantities=BIT_QUANTITIES, default="latency")
    add_models_flag(parser)
    add_image_flags(parser)
    parser.add_argument(
        "--arch_constraint",
        type=float,
        help="budget of the architecture at 8 bits, in the unit of --type "
        "(default: --constraint / --preserve_ratio / --prune_ratio)",
    )
    parser.add_argument(
        "--prune_ratio",
        type=float,
        default=split.prune_ratio,
        help="budget of pruning, fraction of the architecture's",
    )
    parser.add_argument("--prune_episode", type=at_least(1), help="episodes of pruning (default: --train_episode)")
    parser.add_argument("--prune_epochs", type=at_least(1), help="float epochs after pruning (default: the recipe's)")
    add_evolution_flags(parser)
    add_bit_flags(
        parser,
        ratio=f"budget of the bits, fraction of the pruned network's at 8 bits (default: {split.preserve_ratio})",
        fewest="the space's",
        most="the space's",
    )
    add_agent_flags(parser)
    add_deterministic_flag(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Search architecture, channels and bits one after the other; record and print the result."""
    if args.constraint is None:
        raise UserError("a search needs --constraint, the budget of the final network")
    if not QUANTIZERS[args.quantizer].priced:
        raise UserError("--mode sequential prices networks on an accelerator: give --quantizer linear")
    if args.table is not None:
        raise UserError("--mode sequential takes no --table: give an accelerator with --config")
    from methods.sequential.search import search

    search(args)
