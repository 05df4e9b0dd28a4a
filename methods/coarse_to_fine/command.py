"""Measure random subnets of a supernet that needs no finetune, then the best of them with other kernels (OQA).

  search.py --mode coarse_to_fine --acc_predictor_dir DIR --exp_name NAME     writes exps/NAME. Next: test.py

Measurements are kept: a killed search continues with the same command, and a finished one chooses again for another
--constraint or --type without measuring. Under torchrun the processes share the work.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from apq.cli import MOST_CANDIDATES, Parser, at_least
from methods.coarse_to_fine.finder import CoarseToFineConfig
from methods.search.flags import add_budget_flags, add_image_flags, add_models_flag, add_scope_flag, mode_parser


def build_parser() -> Parser:
    parser = mode_parser("coarse_to_fine", __doc__)
    add_budget_flags(parser, default="flops")
    add_scope_flag(parser)
    add_models_flag(parser)
    add_image_flags(parser)
    group = parser.add_argument_group("measured subnets (a search that has begun keeps its settings)")
    default = {field.name: field.default for field in fields(CoarseToFineConfig)}
    # No defaults here: a search that has begun is compared with the given flags alone.
    for name, kind, meaning in (
        ("n_coarse", at_least(1, MOST_CANDIDATES), "random subnets to measure"),
        ("intervals", at_least(1, MOST_CANDIDATES), "intervals of MACs that they are spread over"),
        ("n_fine", at_least(0, MOST_CANDIDATES), "variants with other kernels for each skeleton"),
        ("kernel_prob", float, "probability of each kernel to change"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: {default[name]})")
    group.add_argument("--flops_min", type=float, help="fewest MACs of a subnet (default: the smallest subnet's)")
    group.add_argument("--flops_max", type=float, help="most MACs of a subnet (default: the largest subnet's)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Search, or choose again among the measured subnets."""
    from methods.coarse_to_fine.search import search

    search(args)
