"""Analyses of fronts and supernets.

  python -m report.analyse depths exps/A exps/B        depths of the subnets on the fronts of coarse-to-fine searches
  python -m report.analyse diagram exps/A              the blocks of a subnet with expansion, kernel size and bits
  python -m report.analyse shapes --supernets ...      drop of shallow-fat and deep-slim architectures from the float
                                                       supernet to the others (OQA, section 4.5)
  python -m report.analyse transfer --supernets ...    the front of each supernet judged in the others (appendix A.3)

Each prints a table and writes a PNG. `diagram` takes any experiment, or an arch file with --space. `shapes` and
`transfer` measure random architectures in supernets, as they are after recalibration, on the images that are held out
of training. A killed run continues with the same command. Under torchrun the processes share the work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from apq.cli import MOST_PAIRS, Parser, add_common_flags, at_least, run, table
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record, check_new, read_json
from apq.lock import real
from apq.manifest import listed_files
from apq.presets import get_space
from apq.processes import first_process
from apq.search_result import read_result
from apq.space import SearchSpace
from apq.subnet import Subnet, subnet_from_spec
from report.architectures import DEEP_SLIM, RANDOM, SHALLOW_FAT, Architectures
from report.fronts import depth_section, load_front

READING = ("depths", "diagram")  # analyses of experiments
MEASURING = {"shapes": (SHALLOW_FAT, DEEP_SLIM), "transfer": (RANDOM,)}  # of supernets: the groups that they measure


@dataclass(frozen=True)
class Analysis:
    """The result of an analysis: facts as plain data, or a table with notes below it."""

    facts: Record
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m report.analyse")
    parser.add_argument("what", choices=(*READING, *MEASURING), help="which analysis")
    parser.add_argument("experiments", type=Path, nargs="*", help="folders of experiments; for diagram also arch files")
    parser.add_argument("--space", help="space of an arch file that is not in the folder of a search")
    parser.add_argument("--out", type=Path, help="PNG file (default: ANALYSIS.png in the folder of what is analysed)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out, if it exists")
    group = parser.add_argument_group("flags of shapes and transfer, which measure")
    group.add_argument("--supernets", type=Path, nargs="+", help="folders of models, of the same architectures")
    group.add_argument(
        "--n_architectures",
        type=at_least(4, MOST_PAIRS),
        help="number of architectures (default: 1500, for transfer 10000)",
    )
    group.add_argument("--intervals", type=at_least(1, 1000), default=6, help="intervals of MACs of shapes")
    group.add_argument("--data", type=Path, help="own images: train/CLASS, val/CLASS (default: of the supernets)")
    group.add_argument("--recipe", help="training recipe, for its recalibration images (default: the supernet's)")
    group.add_argument("--netinfo", type=Path, help="folder of the measurements (default: dataset/NetInfo/SPACE)")
    add_common_flags(group)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_flags(args)
    if args.what in MEASURING:
        measure_and_analyse(args)
    elif first_process():
        first = args.experiments[0]
        out = args.out or (first if first.is_dir() else first.parent) / f"{args.what}.png"
        tell(args, out, {"depths": depths, "diagram": diagram}[args.what])


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that do not belong to the analysis, and for files that are there or are not."""
    if args.what in MEASURING and (args.experiments or not args.supernets):
        raise UserError(f"{args.what} measures supernets: give their folders to --supernets, and no experiments")
    if args.what in READING and args.supernets:
        raise UserError(f"--supernets belongs to {' and '.join(MEASURING)}")
    if args.space and args.what != "diagram":
        raise UserError("--space belongs to diagram: experiments know their space")
    if args.what == "diagram" and len(args.experiments) > 1:
        raise UserError("diagram draws one subnet")
    if args.what in READING and not args.experiments:
        raise UserError("give the folder of an experiment")
    if args.what in READING and not args.experiments[0].exists():
        raise UserError(f"no experiment at {args.experiments[0]}")
    if args.out:
        check_new(args.out, args.overwrite)


def measure_and_analyse(args: argparse.Namespace) -> None:
    """Measure what is missing in all processes; analyse, draw and print in the first."""
    from apq.device import resolve_device
    from elastic_nn.training.distributed import joined
    from report.measured_architectures import load_supernets, measure
    from report.plots import check_ours

    device, groups = resolve_device(args.device), MEASURING[args.what]
    supernets = load_supernets(args.supernets, data=args.data, recipe=args.recipe, netinfo=args.netinfo)
    if args.what == "shapes" and len(supernets.floats) != 1:
        raise UserError("shapes compares quantized supernets with one float supernet: give it too, and no other")
    out = args.out or supernets.folder / f"{args.what}.png"
    if not args.overwrite:
        check_ours(out)
    n = args.n_architectures or (1500 if args.what == "shapes" else 10_000)
    sizes = [n // len(groups) + (i < n % len(groups)) for i in range(len(groups))]
    with joined(device) as execution:
        found = [
            measure(supernets, group, size, seed=args.seed, device=device, execution=execution)
            for group, size in zip(groups, sizes, strict=True)
        ]
    if not execution.main:
        return
    words = [group.words(supernets.space) for group in groups]

    def analysis(args: argparse.Namespace, picture: Path) -> Analysis:
        own = shapes(found, args, picture, supernets.floats[0]) if len(groups) > 1 else transfer(found[0], picture)
        return replace(own, facts={"groups": words, "n": n, **own.facts}, notes=[*words, *own.notes])

    tell(args, out, analysis)


def tell(args: argparse.Namespace, out: Path, analysis: Callable[[argparse.Namespace, Path], Analysis]) -> None:
    """Draw the picture of an analysis and print its result."""
    replaced = " (replaced)" if out.exists() else ""
    with place_of(out, overwrite=args.overwrite) as picture:
        found = analysis(args, picture)
    if args.json:
        print(json.dumps({**found.facts, "plot": str(out)}))
        return
    print("\n".join([table(found.rows), *found.notes, f"plot: {out}{replaced}"]))


@contextlib.contextmanager
def place_of(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield the file to draw to. In an experiment it becomes one of its files.

    UserError for a file of others, which only `overwrite` replaces.
    """
    if listed_files(real(out.parent)):
        with Experiment(out.parent).adding(out.name) as own:
            yield own
        return
    from report.plots import check_ours

    if not overwrite:
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
    sections = {"total": depth_section({name: of_front.sum(axis=1) for name, (_, of_front) in fronts.items()})}
    for stage in range(n_stages.pop()):
        of_stage = {name: of_front[:, stage] for name, (_, of_front) in fronts.items()}
        sections[f"stage {stage + 1}"] = depth_section(of_stage)
    plot_depths(sections["total"].counts, sections["total"].depths, out)
    rows = [("blocks", *names), *(row for title, section in sections.items() for row in section.rows(title))]
    return Analysis({"fronts": {title: asdict(section) for title, section in sections.items()}}, rows)


def shapes(found: list[Architectures], args: argparse.Namespace, out: Path, start: str) -> Analysis:
    """Compare the drops of shallow-fat and deep-slim architectures from the supernet `start` to each other one."""
    from report.plots import plot_drops
    from report.shapes import drops_between, facts_of, notes_of, table_of

    fat, slim = found
    others = [name for name in fat.top1 if name != start]
    drops = {name: drops_between(fat, slim, start, name, args.intervals) for name in others}
    points = {
        name: {group.group: (group.flops, group.top1[start] - group.top1[name]) for group in found} for name in others
    }
    plot_drops(points, out)
    return Analysis({"float": start, "drops": facts_of(drops)}, table_of(drops), notes_of(drops))


def transfer(found: Architectures, out: Path) -> Analysis:
    """Judge the front of each supernet in the others, and count the depths of its subnets."""
    from report.plots import plot_transfer
    from report.transfer import common_range, compare_fronts, fronts_in, table_of

    fronts = fronts_in(found)
    rows, total = compare_fronts(found, fronts), found.depths.sum(axis=1)
    section = depth_section({name: total[front] for name, front in fronts.items()})
    curves = {
        judged_in: {name: (found.flops[front], top1[front]) for name, front in fronts.items()}
        for judged_in, top1 in found.top1.items()
    }
    plot_transfer(curves, section.counts, section.depths, out)
    low, high = common_range(found, fronts)
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in section.means.items())
    facts = {"macs_from": low, "macs_to": high, "rows": [asdict(row) for row in rows], "depths": asdict(section)}
    notes = [f"{len(found.flops)} architectures, fronts compared from {low / 1e6:.3f} to {high / 1e6:.3f} M MACs"]
    return Analysis(facts, table_of(rows), [*notes, f"mean blocks on the fronts: {means}"])


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
    run(main, "python -m report.analyse")
