"""What coarse-to-fine searches found: depths of the fronts, shapes of the subnets, the diagram of one subnet.

  python -m report.analyse depths exps/A exps/B   how deep the fronts' subnets are, in all and in every stage
  python -m report.analyse shapes exps/A exps/B   shallow-fat and deep-slim subnets of about equal FLOPs compared
  python -m report.analyse diagram exps/A         the blocks of a subnet with expansion, kernel and bits

Each prints a table and writes a PNG. `diagram` takes any experiment, or an arch file with --space.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apq.cli import Parser, run, table
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json
from apq.presets import get_space
from apq.space import SearchSpace
from apq.subnet import Subnet, subnet_from_spec
from report.fronts import compare_shapes, depth_counts, load_coarse, load_front, mean_advantage


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("depths", "shapes", "diagram"), help="which analysis")
    parser.add_argument("experiments", type=Path, nargs="+", help="folders of experiments; for diagram also arch files")
    parser.add_argument("--space", help="space of an arch file that is not in the folder of a search")
    parser.add_argument("--out", type=Path, help="picture (default: ANALYSIS.png in the folder of the first)")
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
    facts, rows = {"depths": depths, "shapes": shapes, "diagram": diagram}[args.what](args, out)
    if args.json:
        print(json.dumps({**facts, "plot": str(out)}))
        return
    print(table(rows))
    for name, mean in facts.get("mean_advantage", {}).items():
        advantage = "no interval has both" if mean is None else f"{100 * mean:+.2f} points, mean of the intervals"
        print(f"{name}: shallow-fat against deep-slim {advantage}")
    print(f"plot: {out}")


def depths(args: argparse.Namespace, out: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Count the subnets of each front by total depth and by the depth of every stage."""
    from report.plots import plot_depths

    names = names_of(args.experiments)
    fronts = {name: load_front(Experiment(path)) for name, path in names.items()}
    n_stages = {len(space.stages) for space, _ in fronts.values()}
    if len(n_stages) > 1:
        raise UserError("the experiments have spaces of different stages: their depths cannot be compared")
    sections: dict[str, dict[str, Any]] = {}
    for stage in (None, *range(n_stages.pop())):
        of = {name: s.total_depth if stage is None else s.depths[:, stage] for name, (_, s) in fronts.items()}
        choices = range(min(int(d.min()) for d in of.values()), 1 + max(int(d.max()) for d in of.values()))
        counts = {name: depth_counts(d, choices) for name, d in of.items()}
        means = {name: float(d.mean()) for name, d in of.items()}
        key = "total" if stage is None else f"stage {stage + 1}"
        sections[key] = {"depths": list(choices), "counts": counts, "means": means}
    plot_depths(sections["total"]["counts"], sections["total"]["depths"], out)
    rows = [("blocks", *names)]
    for key, section in sections.items():
        for i, depth in enumerate(section["depths"]):
            rows.append((f"{key}: {depth}", *(str(section["counts"][name][i]) for name in names)))
        rows.append((f"{key}: mean", *(f"{section['means'][name]:.2f}" for name in names)))
    return {"fronts": sections}, rows


def shapes(args: argparse.Namespace, out: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Compare the mean top-1 of shallow-fat and deep-slim coarse subnets in each interval of FLOPs."""
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
    facts = {
        "intervals": {name: [asdict(row) for row in of_experiment] for name, of_experiment in found.items()},
        "mean_advantage": {name: mean_advantage(of_experiment) for name, of_experiment in found.items()},
    }
    return facts, rows


def diagram(args: argparse.Namespace, out: Path) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
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
    return {"space": space.name, "resolution": subnet.resolution, "blocks": [asdict(box) for box in boxes]}, rows


def subnet_at(path: Path, space_name: str | None) -> tuple[SearchSpace, Subnet]:
    """Read a subnet and its space from an experiment's folder or an arch file.

    The space of an arch file is that of its folder, unless `space_name` names another.
    """
    if path.is_dir() or space_name is None:
        experiment = Experiment(path if path.is_dir() else path.parent)
        space = experiment.load_space() if space_name is None else get_space(space_name)
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
    """Map a short name to each folder: its last part, or its whole path where two folders end alike."""
    plain = [path.name for path in paths]
    return {path.name if plain.count(path.name) == 1 else str(path): path for path in paths}


if __name__ == "__main__":
    run(main, "python -m report.analyse")
