"""Search architecture, channel pruning and bits together under one budget, by evolution on predicted accuracy.

  search.py --constraint 0.05 --type latency --exp_name NAME     writes exps/NAME. Next: quant_aware.py

With --refine ROUNDS --measure N the search measures what it finds: after each round the most promising and the most
uncertain candidates are measured, and the predictor learns from them. The result is the best measured subnet. Under
torchrun the processes share the measuring. A killed search continues with the same command.
"""

from __future__ import annotations

import argparse

from apq.cli import Parser, add_deterministic_flag, at_least
from apq.errors import UserError
from lut.costs import UNITS
from methods.search.flags import (
    add_budget_flags,
    add_evolution_flags,
    add_image_flags,
    add_models_flag,
    add_refine_flag,
    add_risk_flag,
    add_scope_flag,
    mode_parser,
)


def build_parser() -> Parser:
    parser = mode_parser("evolution", __doc__)
    add_budget_flags(parser, default="latency")
    add_scope_flag(parser)
    add_models_flag(parser)
    add_risk_flag(parser)
    add_evolution_flags(parser)
    group = parser.add_argument_group("measurement of candidates")
    add_refine_flag(group)
    group.add_argument(
        "--measure", type=at_least(1), metavar="N", help="how many subnets to measure in all rounds together"
    )
    add_image_flags(group)
    add_deterministic_flag(group)
    return parser


def run(args: argparse.Namespace) -> None:
    """Search, record, print."""
    if args.constraint is None:
        raise UserError("a search needs --constraint, a budget in " + ", ".join(UNITS.values()))
    if args.refine is None and (args.measure is not None or args.recipe or args.data or args.deterministic):
        raise UserError("--measure, --recipe, --data and --deterministic belong to --refine")
    from methods.evolution.search import search

    search(args)
