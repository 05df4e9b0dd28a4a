"""Search the front of predicted accuracy and costs for all budgets at once (NSGA-II); pick a point for one of them.

  search.py --mode nsga2 --objectives accuracy,latency --exp_name NAME     search; writes exps/NAME
  search.py --mode nsga2 --pick 'latency<=0.03' --exp_name NAME            pick a point of that front, without a search

Next: test.py, or for a float supernet quant_aware.py. A killed search continues with the same command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from apq.cli import MOST_CANDIDATES, Parser, at_least
from lut.costs import UNITS
from methods.nsga2.config import OBJECTIVES, Nsga2Config
from methods.search.flags import add_models_flag, add_scope_flag, mode_parser


def build_parser() -> Parser:
    parser, default = mode_parser("nsga2", __doc__), Nsga2Config()
    parser.add_argument(
        "--objectives",
        help=f"accuracy and 1 to 3 costs of {', '.join(UNITS)}, separated by commas (default: {','.join(OBJECTIVES)}); "
        "flops are the same at any bits, bitops are not",
    )
    units = ", ".join(f"{name}: {unit}" for name, unit in UNITS.items())
    parser.add_argument(
        "--pick",
        help=f"bounds such as 'latency<=8.4,size<9000' ({units}): choose the most accurate point within them",
    )
    parser.add_argument("--front", type=Path, help="folder of an experiment: pick from its front instead of searching")
    add_scope_flag(parser)
    add_models_flag(parser)
    for flag, instead in (("--type", "--objectives names the costs"), ("--constraint", "--pick gives the bounds")):
        parser.add_argument(flag, type=refused(instead), help=argparse.SUPPRESS)
    group = parser.add_argument_group("NSGA-II")
    # No defaults here: a pick compares only the given flags with the search that made the front.
    for name, kind, meaning in (
        ("population", at_least(0, MOST_CANDIDATES), "candidates a generation"),
        ("generations", int, "generations to run"),
        ("crossover_prob", float, "probability of each gene to come from the second parent"),
        ("mutation_prob", float, "probability of each gene to be redrawn"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: {getattr(default, name)})")
    return parser


def refused(reason: str) -> Callable[[str], NoReturn]:
    """The `type` of a flag that other modes have and this one has not."""

    def refuse(_: str) -> NoReturn:
        raise argparse.ArgumentTypeError(f"--mode nsga2 has no such flag: {reason}")

    return refuse


def run(args: argparse.Namespace) -> None:
    """Search a front, or load one; pick a point, record, print."""
    from methods.nsga2.search import search_or_pick

    search_or_pick(args)
