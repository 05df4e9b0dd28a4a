"""Throw damaged files and command lines at the program: nothing may come but a result or one line and exit code 2.

  python -m benchmarks.hostile --files 20000 --commands 3000       a campaign
  python -m benchmarks.hostile --only 'space:17'                   one of its cases again, with what it said

Files of every kind are made by the program itself in a temporary folder, damaged one at a time and read again; command
lines are drawn from the parsers of all scripts. All cases run in one process. The counts are printed, and the exit code
is 1 if any case ended in a traceback, wrote outside the folder, took more memory than allowed or did not end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from apq.cli import Parser, at_least, table
from benchmarks.hostile_commands import Commands
from benchmarks.hostile_guard import Guard, Outcome
from benchmarks.hostile_mutations import KINDS, damaged, place, remove
from benchmarks.hostile_world import Format, formats, make_world
from benchmarks.machine import describe

MOST_MIB = 500.0  # that one case may take more than there was before it
FILE_S, COMMAND_S = 20.0, 2.0  # a file that takes longer hangs; a command that takes longer works
SHARE_OF_PLACES = 0.03  # of the cases that put something else than a file at the path


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case by name, what was done, and how it ended."""

    name: str
    what: str
    outcome: Outcome
    hangs: bool

    @property
    def wrong(self) -> str | None:
        """What is wrong with how it ended, None if nothing is."""
        return self.outcome.wrong(MOST_MIB) or ("does not end" if self.hangs and self.outcome.code is None else None)


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m benchmarks.hostile")
    parser.add_argument("--files", type=at_least(0), default=20_000, help="damaged files, over all formats")
    parser.add_argument("--commands", type=at_least(0), default=3_000, help="command lines")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the campaign")
    parser.add_argument("--only", metavar="NAME:NUMBER", help="run this case alone")
    parser.add_argument("--formats", help="only formats whose names contain this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # modules that a case imports first leave no file beside them
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="hostile-") as root:
        folder = Path(root) / "world"
        folder.mkdir()
        own = {name: str(folder) for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")}
        os.environ.update(own, APQ_CACHE=str(folder / "cache"), MPLBACKEND="agg")
        tempfile.tempdir = str(folder)
        os.chdir(folder)
        try:
            make_world()
            cases = list(campaign(args, Guard(folder)))
        finally:
            os.chdir(home)
    report(args, cases)
    if any(case.wrong for case in cases):
        sys.exit(1)


def campaign(args: argparse.Namespace, guard: Guard) -> Iterator[Case]:
    """All cases, or the one that --only names."""
    kinds = [kind for kind in formats() if (args.formats or "") in kind.name]
    only, _, number = (args.only or "").rpartition(":")
    for i in range(args.files if not only else 0):
        kind = kinds[i % len(kinds)]
        yield file_case(kind, f"{kind.name}:{i // len(kinds)}", args.seed, guard)
    for kind in kinds:
        if kind.name == only:
            yield file_case(kind, f"{only}:{number}", args.seed, guard)
    commands = Commands()
    for i in range(args.commands) if not only else [int(number)] * (only == "command"):
        name = f"command:{i}"
        words, main = commands.draw(random.Random(f"{args.seed} {name}"))
        outcome = guard.run(main, words[1:], words[0], COMMAND_S)
        yield Case(name=name, what=" ".join(map(ascii, words)), outcome=outcome, hangs=False)
        commands.restore(every=20)


def file_case(kind: Format, name: str, seed: int, guard: Guard) -> Case:
    """Damage a file, read it, put it back."""
    rng, whole = random.Random(f"{seed} {name}"), kind.file.read_bytes()
    if rng.random() < SHARE_OF_PLACES:
        what = rng.choice(KINDS)
        place(kind.file, what)
    else:
        suffix = kind.file.suffix
        what, content = damaged(whole, suffix, rng)
        kind.file.write_bytes(content)
    outcome = guard.run(lambda argv: kind.read(), [], kind.name, FILE_S)
    remove(kind.file)
    kind.file.write_bytes(whole)
    return Case(name=name, what=what, outcome=outcome, hangs=True)


def report(args: argparse.Namespace, cases: list[Case]) -> None:
    """Print counts by format and exit code, and every case that is wrong."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.name.rpartition(":")[0]].append(case)
    wrong = [case for case in cases if case.wrong]
    if args.json:
        facts = {
            "seed": args.seed,
            "machine": describe(),
            "cases": len(cases),
            "wrong": {case.name: f"{case.what}: {case.wrong}" for case in wrong},
            "codes": dict(Counter(str(case.outcome.code) for case in cases)),
            "peak_mib": max((case.outcome.peak_mib for case in cases), default=0.0),
        }
        print(json.dumps(facts))
        return
    rows = [("format", "cases", "exit 0", "exit 2", "cut", "wrong", "slowest, s", "peak, MiB")]
    for name, own in [*groups.items(), ("all", cases)]:
        codes = Counter(case.outcome.code for case in own)
        slowest, peak = (max((getattr(c.outcome, key) for c in own), default=0.0) for key in ("seconds", "peak_mib"))
        numbers = (len(own), codes[0], codes[2], codes[None], sum(bool(case.wrong) for case in own))
        rows.append((name, *map(str, numbers), f"{slowest:.2f}", f"{peak:.0f}"))
    print(table(rows))
    for case in wrong:
        lines = case.wrong.strip().splitlines()
        place = next((line.strip() for line in reversed(lines) if line.strip().startswith("File")), "")
        print(f"{case.name} ({case.what[:200]}): {lines[-1][:200]} {place}")
        if args.only:
            print(case.wrong)
    if args.only:
        for case in cases:
            print(f"{case.name}: exit {case.outcome.code}\n{case.outcome.said}")


if __name__ == "__main__":
    main()
