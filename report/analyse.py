"""Analyses of coarse-to-fine searches: depths of fronts, shapes of subnets, the diagram of one subnet.

  python -m report.analyse depths exps/A exps/B   depths of the subnets on the fronts, in total and in every stage
  python -m report.analyse shapes exps/A exps/B   shallow-fat against deep-slim subnets of about equal MACs
  python -m report.analyse diagram exps/A         the blocks of a subnet with expansion, kernel size and bits

Each prints a table and writes a PNG. `diagram` takes any experiment, or an arch file with --space.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from apq.cli import Parser, run, table
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record, read_json
from apq.lock import real
from apq.manifest import listed_files
from apq.presets import get_space
from apq.search_result import read_result
from apq.space import SearchSpace
from apq.subnet import Subnet, subnet_from_spec
from report.fronts import compare_shapes, depth_counts, load_coarse, load_front, mean_advantage


@dataclass(frozen=True)
class Analysis:
    """The result of an analysis: facts as plain data, or a table with notes below it."""

    facts: Record
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class DepthSection:
    """The number of subnets of each front at each of `depths`, and the mean depth of each front."""

    depths: list[int]
    counts: dict[str, list[int]]
    means: dict[str, float]

    def rows(self, title: str) -> list[tuple[str, ...]]:
        """One row of counts for each depth, and one of means."""
        counts = [
            (f"{title}: {depth}", *(str(of_front[i]) for of_front in self.counts.values()))
            for i, depth in enumerate(self.depths)
        ]
        return [*counts, (f"{title}: mean", *(f"{mean:.2f}" for mean in self.means.values()))]


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m report.analyse")
    parser.add_argument("what", choices=("depths", "shapes", "diagram"), help="which analysis")
    parser.add_argument("experiments", type=Path, nargs="+", help="folders of experiments; for diagram also arch files")
    parser.add_argument("--space", help="space of an arch file that is not in the folder of a search")
    parser.add_argument("--out", type=Path, help="PNG file (default: ANALYSIS.png in the folder of the first)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.space and args.what != "diagram":
        raise UserError("--space belongs to diagram: experiments know their space")
    if args.what == "diagram" and len(args.experiments) > 1:
        raise UserError("diagram draws one subnet")
    first = args.experiments[0]
    if not first.exists():
        raise UserError(f"no experiment at {first}")
    out = args.out or (first if first.is_dir() else first.parent) / f"{args.what}.png"
    with place_of(out) as picture:
        analysis = {"depths": depths, "shapes": shapes, "diagram": diagram}[args.what](args, picture)
    if args.json:
        print(json.dumps({**analysis.facts, "plot": str(out)}))
        return
    print("\n".join([table(analysis.rows), *analysis.notes, f"plot: {out}"]))


@contextlib.contextmanager
def place_of(out: Path) -> Iterator[Path]:
    """Yield the file to draw to. In an experiment it becomes one of its files. UserError for a file of others."""
    if listed_files(real(out.parent)):
        with Experiment(out.parent).adding(out.name) as own:
            yield own
        return
    from report.plots import check_ours

    check_ours(out)
    yield out


def depths(args: argparse.Namespace, out: Path) -> Analysis:
    """Count the subnets of each front by total depth and by the depth of every stage."""
    from report.plots import plot_depths

    names = names_of(args.experiments)
    fronts = {name: load_front(Experiment(path)) for name, path in names.items()}
    n_stages = {len(space.stages) for space, _ in fronts.values()}
    if len(n_stages) > 1:
        raise UserError("the experiments have spaces of different stages: their depths cannot be compared")
    sections = {"total": depth_section({name: shapes.total_depth for name, (_, shapes) in fronts.items()})}
    for stage in range(n_stages.pop()):
        of_stage = {name: shapes.depths[:, stage] for name, (_, shapes) in fronts.items()}
        sections[f"stage {stage + 1}"] = depth_section(of_stage)
    plot_depths(sections["total"].counts, sections["total"].depths, out)
    rows = [("blocks", *names), *(row for title, section in sections.items() for row in section.rows(title))]
    return Analysis({"fronts": {title: asdict(section) for title, section in sections.items()}}, rows)


def depth_section(depths: Mapping[str, np.ndarray]) -> DepthSection:
    """Count the depths (n,) of each front, from the smallest to the largest of all."""
    choices = range(min(int(d.min()) for d in depths.values()), 1 + max(int(d.max()) for d in depths.values()))
    return DepthSection(
        depths=list(choices),
        counts={name: depth_counts(d, choices) for name, d in depths.items()},
        means={name: float(d.mean()) for name, d in depths.items()},
    )


def shapes(args: argparse.Namespace, out: Path) -> Analysis:
    """Compare the mean top-1 of shallow-fat and deep-slim coarse subnets in each interval of MACs."""
    from report.plots import plot_shapes

    found = {}
    for name, path in names_of(args.experiments).items():
        _, measured, edges = load_coarse(Experiment(path))
        found[name] = compare_shapes(measured, edges)
    plot_shapes(found, out)
    rows = [("experiment", "MACs, M", "subnets", "shallow-fat", "top-1", "deep-slim", "top-1")]
    for name, of_experiment in found.items():
        for row in of_experiment:
            span = f"{row.flops_from / 1e6:.3f}-{row.flops_to / 1e6:.3f}"
            fat, slim = ("-" if mean is None else f"{mean:.2%}" for mean in (row.shallow_fat, row.deep_slim))
            rows.append((name, span, str(row.n), str(row.n_shallow_fat), fat, str(row.n_deep_slim), slim))
    advantages = {name: mean_advantage(of_experiment) for name, of_experiment in found.items()}
    notes = []
    for name, mean in advantages.items():
        advantage = "no interval has both" if mean is None else f"{100 * mean:+.2f} points, mean of the intervals"
        notes.append(f"{name}: shallow-fat against deep-slim {advantage}")
    intervals = {name: [asdict(row) for row in of_experiment] for name, of_experiment in found.items()}
    return Analysis({"intervals": intervals, "mean_advantage": advantages}, rows, notes)


def diagram(args: argparse.Namespace, out: Path) -> Analysis:
    """Draw and list the blocks of one subnet."""
    from report.diagram import boxes_of, draw_subnet

    path = args.experiments[0]
    space, subnet = subnet_at(path, args.space)
    boxes = boxes_of(space, subnet)
    draw_subnet(boxes, subnet.resolution, out, title=f"{path}, space {space.name}")
    rows = [("block", "stage", "channels", "expansion", "kernel", "stride", "bits")]
    for box in boxes:
        channels = f"{box.in_channels}-{box.mid_channels}-{box.out_channels}"
        numbers = (f"{box.expansion:g}", str(box.kernel), str(box.stride), box.bits.replace("\n", ", "))
        rows.append((str(box.slot + 1), str(box.stage + 1), channels, *numbers))
    blocks = [asdict(box) for box in boxes]
    return Analysis({"space": space.name, "resolution": subnet.resolution, "blocks": blocks}, rows)


def subnet_at(path: Path, space_name: str | None) -> tuple[SearchSpace, Subnet]:
    """Read a subnet and its space from an experiment's folder or an arch file.

    The space of an arch file is that of its folder, unless `space_name` names another.
    """
    if path.is_dir() or space_name is None:
        experiment = Experiment(path if path.is_dir() else path.parent)
        space = read_result(experiment).found_subnet.space if space_name is None else get_space(space_name)
        if path.is_dir():
            return space, experiment.load_subnet(space)
    else:
        space = get_space(space_name)
    parts = read_json(path)
    if not (isinstance(parts, list) and all(isinstance(part, dict) for part in parts)):
        raise UserError(f"{path} must hold a list of objects, architecture then policy")
    try:
        return space, subnet_from_spec(space, {key: value for part in parts for key, value in part.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """Map a short name to each folder: its last part, or the whole path if another folder has the same last part."""
    plain = [path.name for path in paths]
    return {path.name if plain.count(path.name) == 1 else str(path): path for path in paths}


if __name__ == "__main__":
    run(main, "python -m report.analyse", alone=True)
