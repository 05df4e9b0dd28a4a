"""The evidence behind docs/results.md: every question over several seeds of the supernet, the pairs and all else.

  pairs   How many pairs does a predictor need?
  joint   Does joint search pay?
  bits    Does the agent choose better bits than simpler methods?
  oqa     Is it better to inherit few bits from more bits than to train them from floating point?
  qfa     Do subnets of a mixed-precision supernet need a finetune?

Each seed trains its own supernet of the fashion space, measures its own pairs and searches anew; about an hour and a
half on one core. Runs are ordered by seed, so that after each seed every question has one run more of each method.
Every finished run is a line of --out/runs.jsonl; a killed run continues. Processes with other --seeds may share --out.
--tables prints what is finished, with means, standard deviations and paired tests, and draws a plot for each question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from apq.cli import LARGEST_SEED, Parser, at_least, run
from apq.device import resolve_device
from apq.files import append_jsonl, check_writable
from benchmarks import evidence_bits, evidence_joint, evidence_oqa, evidence_pairs, evidence_qfa
from benchmarks.evidence_ground import Ground, NoResult
from benchmarks.evidence_lines import FILE, Question, as_record, read_lines
from benchmarks.evidence_setting import FASHION_SETTING, TINY_SETTING, Setting
from benchmarks.evidence_tables import plot, tables
from dataset import load_splits
from elastic_nn.training.engine import DivergedError

MODULES = (evidence_pairs, evidence_joint, evidence_bits, evidence_oqa, evidence_qfa)
QUESTIONS = {module.QUESTION.name: module.QUESTION for module in MODULES}
SEEDS = (0, 1, 2, 3, 4)


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--questions", nargs="+", choices=tuple(QUESTIONS), default=tuple(QUESTIONS), help="to answer")
    parser.add_argument("--seeds", type=at_least(0, LARGEST_SEED), nargs="+", default=SEEDS, help="seeds to run")
    parser.add_argument("--out", type=Path, default=Path("exps/evidence"), help="folder of runs, supernets and pairs")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when present")
    parser.add_argument("--tables", action="store_true", help="only print and draw what is finished")
    parser.add_argument("--tiny", action="store_true", help="show in a minute that all runs: nothing is trained well")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    setting = TINY_SETTING if args.tiny else FASHION_SETTING
    questions = [QUESTIONS[name] for name in args.questions]
    check_writable(args.out)
    if not args.tables:
        answer(questions, setting, args)
    show(questions, setting, args.out)


def answer(questions: Sequence[Question], setting: Setting, args: argparse.Namespace) -> None:
    """Make the runs that are missing, seed after seed."""
    device, splits = resolve_device(args.device), load_splits(setting.space)
    done = read_lines(args.out, settings_of(setting))
    for seed in dict.fromkeys(args.seeds):
        ground = Ground(setting, seed, args.out / f"seed-{seed}", splits, device)
        wanted = [(question, one) for question in questions for one in question.runs(setting, seed) if one not in done]
        for question, one in tqdm(wanted, f"seed {seed}", disable=None):
            try:
                figures = question.measure(one, ground)
            except (NoResult, DivergedError) as error:
                figures = {"failed": str(error)}
            append_jsonl(args.out / FILE, as_record(one, figures, question.setting(setting)))
            key, title, factor, decimals = question.figures[0]
            told = figures.get("failed") or f"{title} {factor * figures[key]:.{decimals}f}"
            tqdm.write(f"seed {seed}, {one.method}, {one.limit:g} ({one.quantity}): {told}", file=sys.stderr)


def show(questions: Sequence[Question], setting: Setting, out: Path) -> None:
    """Print the tables of the finished runs, and draw their plots."""
    lines = list(read_lines(out, settings_of(setting)).values())
    for question in questions:
        if own := question.lines(lines):
            print(f"## {question.title}\n\n{tables(question, own)}\n")
            plot(question, own, out / f"{question.name}.svg")


def settings_of(setting: Setting) -> dict[str, object]:
    """The setting of each question, as lines record it."""
    return {name: question.setting(setting) for name, question in QUESTIONS.items()}


if __name__ == "__main__":
    run(main)
