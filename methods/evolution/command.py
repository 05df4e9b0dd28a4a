"""Search architecture, channel pruning and bits together under one budget, by evolution on predicted accuracy.

  search.py --constraint 0.05 --type latency --exp_name NAME     writes exps/NAME. Next: quant_aware.py

A killed search continues with the same command.
"""

from __future__ import annotations

import argparse

from apq.cli import Parser
from apq.errors import UserError
from lut.costs import UNITS
from methods.search.flags import (
    add_budget_flags,
    add_evolution_flags,
    add_models_flag,
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
    return parser


def run(args: argparse.Namespace) -> None:
    """Search, record, print."""
    if args.constraint is None:
        raise UserError("a search needs --constraint, a budget in " + ", ".join(UNITS.values()))
    from methods.evolution.search import search

    search(args)
