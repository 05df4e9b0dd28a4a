"""Gather <subnet, accuracy> pairs from a supernet and train the accuracy predictor on them.

  search.py --prepare acc                                 gather float pairs, train the float predictor
  search.py --prepare acc_quant --acc_train_sample N      gather N quantized pairs, train the quantized predictor

Pairs are appended to dataset/NetInfo/SPACE. A killed run continues with the same command. Under torchrun the processes
share the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from apq.cli import MOST_MEMBERS, MOST_PAIRS, Parser, add_common_flags, add_deterministic_flag, at_least
from apq.policy import QUANTIZER_HELP, of_activations
from elastic_nn.training.recipe import PREDICTORS
from methods.search.flags import add_image_flags, add_models_flag

PAIR_DRAWS = ("uniform", "stratified")


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="search.py --prepare acc")
    parser.add_argument("--prepare", choices=("acc", "acc_quant"), required=True, help=argparse.SUPPRESS)
    add_models_flag(parser)
    add_image_flags(parser)
    parser.add_argument(
        "--quantizer",
        choices=of_activations(),
        help=f"{QUANTIZER_HELP}; where there are pairs already: theirs",
    )
    parser.add_argument(
        "--acc_train_sample", type=at_least(0, MOST_PAIRS), help="pairs to gather (default: the recipe's)"
    )
    parser.add_argument(
        "--pairs",
        choices=PAIR_DRAWS,
        help="how quantized pairs are drawn: uniform choices, or QFA's strata (default: the recipe's)",
    )
    parser.add_argument(
        "--predictor",
        choices=PREDICTORS,
        help="what is trained: MLPs, or a kernel regression, which errs less on few quantized pairs (default: the "
        "recipe's)",
    )
    parser.add_argument(
        "--members",
        type=at_least(1, MOST_MEMBERS),
        metavar="N",
        help="train N smaller MLPs, whose spread says where they are unsure (search.py --risk); their mean is the "
        "prediction (default: as many as the float predictor that this one starts from, or one; members that start "
        "from the same MLP hardly differ)",
    )
    parser.add_argument("--netinfo", type=Path, help="folder of the pairs (default: dataset/NetInfo/SPACE)")
    parser.add_argument("--overwrite", action="store_true", help="replace a predictor that exists")
    add_common_flags(parser)
    add_deterministic_flag(parser)
    for published in ("--exp_name", "--exp_dir", "--type", "--config", "--table"):  # accepted, without effect
        parser.add_argument(published, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> None:
    """Gather the missing pairs, train the predictor, save it, print its scores."""
    from methods.prepare.predictor import prepare

    prepare(args)
