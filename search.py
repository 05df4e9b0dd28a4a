"""Search architecture, channel pruning and bit-widths together under one budget; or train the predictor for a search.

  search.py --constraint 0.05 --type latency --exp_name NAME     search; writes exps/NAME. Next: quant_aware.py
  search.py --mode nsga2 --objectives accuracy,latency           search in another way, with flags of its own
  search.py --mode nsga2 --help                                  show the flags of that mode
  search.py --prepare acc                                        gather pairs, train the accuracy predictor

A killed run continues with the same command.
"""

from __future__ import annotations

import sys

from apq.cli import Parser, run
from methods import DEFAULT_MODE, MODES, PREPARE
from methods.search.one_run import run_mode


def build_parser() -> Parser:
    """The parser of --mode and --prepare. All other flags go to the parser of the mode."""
    summaries = {f"--mode {name}": mode.summary for name, mode in MODES.items()} | {"--prepare": PREPARE.summary}
    modes = "\n".join(f"  {name:24} {summary}" for name, summary in summaries.items())
    parser = Parser(
        f"{__doc__}\nmodes (search.py --mode MODE --help shows the flags; all have --seed, --device, --json):\n{modes}",
        usage="search.py [--help] [--mode MODE | --prepare PREDICTOR] [flags of the mode]",
        add_help=False,
    )
    parser.add_argument("--mode", choices=tuple(MODES), help=f"how to search (default: {DEFAULT_MODE})")
    parser.add_argument("--prepare", choices=("acc", "acc_quant"), help="gather pairs and train a predictor instead")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    front = build_parser()
    asked, flags = front.parse_known_args(argv)
    if asked.mode is None and asked.prepare is None and {"-h", "--help"} & set(flags):
        front.print_help()
        return
    mode = PREPARE if asked.prepare else MODES[asked.mode or DEFAULT_MODE]
    if asked.prepare:
        flags += ["--prepare", asked.prepare]
    command = mode.load()
    parser = command.build_parser()
    if asked.mode is None and not asked.prepare:
        parser.help_command += ", for other modes search.py --help"
    run_mode(mode, command, parser.parse_args(flags))


if __name__ == "__main__":
    run(main)
