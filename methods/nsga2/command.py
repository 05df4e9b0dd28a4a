"""Search the front of predicted accuracy and costs for all budgets at once (NSGA-II); pick and measure points of it.

  search.py --mode nsga2 --objectives accuracy,latency --exp_name NAME     search; writes exps/NAME
  search.py --mode nsga2 --pick 'latency<=0.03' --exp_name NAME            pick a point of that front, without a search
  search.py --mode nsga2 --measure 10 --exp_name NAME                      measure ten points of it in the supernet
  search.py --mode nsga2 --refine 3 --measure 40 --exp_name NAME           search in three rounds, measure in each

Next: test.py, or for a float supernet quant_aware.py. A killed search or measurement continues with the same command.
Under torchrun the processes share the measuring.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from apq.cli import MOST, MOST_CANDIDATES, Parser, add_deterministic_flag, at_least
from lut.costs import UNITS
from methods.nsga2.config import NSGA2S, OBJECTIVES, Nsga2Config
from methods.search.flags import (
    add_image_flags,
    add_models_flag,
    add_preset_flag,
    add_refine_flag,
    add_risk_flag,
    add_scope_flag,
    mode_parser,
)


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
    add_risk_flag(parser)
    measuring = parser.add_argument_group("measurement of points of the front")
    measuring.add_argument("--measure", type=number_or_all, metavar="N", help="how many points to measure, or all")
    add_refine_flag(measuring)
    measuring.add_argument(
        "--finetune_epochs",
        type=at_least(0),
        default=0,
        help="epochs of a short finetune, as the recipe's of pairs, before each measurement; 0: as they are",
    )
    add_image_flags(measuring)
    add_deterministic_flag(measuring)
    for flag, instead in (("--type", "--objectives names the costs"), ("--constraint", "--pick gives the bounds")):
        parser.add_argument(flag, type=refused(instead), help=argparse.SUPPRESS)
    group = parser.add_argument_group("NSGA-II")
    add_preset_flag(group, "nsga2", NSGA2S)
    # No defaults here: a pick compares only the given flags with the search that made the front.
    for name, kind, meaning in (
        ("population", at_least(0, MOST_CANDIDATES), "candidates a generation"),
        ("generations", int, "generations to run"),
        ("crossover_prob", float, "probability of each gene to come from the second parent"),
        ("mutation_prob", float, "probability of each gene to be redrawn"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: {getattr(default, name)})")
    return parser


def number_or_all(text: str) -> int:
    """The `type` of --measure: a whole number of points; all is more than any front has."""
    return MOST if text == "all" else at_least(1)(text)


def refused(reason: str) -> Callable[[str], NoReturn]:
    """The `type` of a flag that other modes have and this one has not."""

    def refuse(_: str) -> NoReturn:
        raise argparse.ArgumentTypeError(f"--mode nsga2 has no such flag: {reason}")

    return refuse


def run(args: argparse.Namespace) -> None:
    """Search a front, or load one; pick a point, measure points, record, print."""
    from methods.nsga2.search import search_or_pick

    search_or_pick(args)
