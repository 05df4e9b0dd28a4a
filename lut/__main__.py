"""Costs of networks and layers on an accelerator: latency in ms and energy in mJ.

python -m lut --model NAME                    print the costs of a network. NAME: a classification model of torchvision,
                                              mobilenet_v2_small or another own network of train.py, exps/NAME (found
                                              by a search), SPACE:largest or SPACE:smallest
python -m lut --space SPACE --out FILE        write the cost table of a space: all layers that its networks can have
python -m lut --measure RUNTIME --space SPACE --out FILE
                                              the same, with latencies measured on this machine's CPU
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from dataclasses import asdict
from pathlib import Path

from apq.cli import MOST_SIDE, Parser, add_common_flags, at_least, run, table
from apq.errors import UserError
from apq.files import check_new, write_json
from apq.layers import ConvLayer
from apq.presets import get_space
from lut.cost_model import CostModel, add_cost_flags, cost_model_from_flags, recorded_cost_model
from lut.costs import by_scope, cost_of, cost_rows
from lut.named import network_named
from lut.runtimes import RUNTIMES
from lut.table import build

MOST_THREADS = 1 << 10
# The flags that each kind of work takes, and what it is called where another one is given.
PRINTING, WRITING, MEASURING = "--model", "writing the table of a space", "--measure"
FLAGS = {
    PRINTING: {"model", "bits", "resolution", "layers", "table", "config"},
    WRITING: {"space", "out", "overwrite", "config"},
    MEASURING: {"measure", "space", "out", "overwrite", "bits", "threads"},
}


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m lut")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--model", metavar="NAME", help="network to print the costs of")
    work.add_argument("--measure", choices=tuple(RUNTIMES), help="runtime to measure the layers of --space in")
    parser.add_argument(
        "--bits",
        type=bits,
        metavar="W|WxA",
        help="bits of weights and activations of --model (default: 8, or the highest of its space), or those that "
        "--measure times: 8x8 for integers, 32x32 for floating point, 4x4 for files of export.py, whatever their bits "
        "(default: 8x8 where the runtime has it)",
    )
    parser.add_argument("--threads", type=at_least(1, MOST_THREADS), help="threads of --measure (default: 1)")
    parser.add_argument(
        "--resolution", type=at_least(1, MOST_SIDE), help="side of the image, in pixels (default: 224, or the space's)"
    )
    parser.add_argument("--layers", action="store_true", help="also print one row for each layer of --model")
    parser.add_argument("--space", help="a preset, or the path of a space in a .json file (default: digits)")
    parser.add_argument("--out", type=Path, help="cost table to write, in the published JSON form")
    parser.add_argument("--overwrite", action="store_true", help="replace a cost table that exists")
    add_cost_flags(parser, "what an experiment's search used, else the published BitFusion")
    add_common_flags(parser, seed=False, device=False)
    return parser


def bits(text: str) -> tuple[int, int]:
    """The `type` of a flag that takes bits of weights and activations: "8", or "4x8"."""
    if not (found := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 8, or 4x8 (weights x activations)")
    weights, activations = found.groups()
    return int(weights), int(activations or weights)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_flags(args)
    if args.model:
        print_model(args)
    elif not args.out:
        raise UserError(
            "give --model NAME to print a network's costs, or --space SPACE --out FILE to write a table, with "
            "--measure one of this machine"
        )
    elif args.measure:
        measure_table(args)
    else:
        write_table(args)


def check_flags(args: argparse.Namespace) -> None:
    """UserError for a flag of other work."""
    work = PRINTING if args.model else MEASURING if args.measure else WRITING
    given = [flag for flag, value in vars(args).items() if value not in (None, False) and flag != "json"]
    if foreign := [flag for flag in given if flag not in FLAGS[work]]:
        owners = " and ".join(owner for owner, flags in FLAGS.items() if foreign[0] in flags)
        raise UserError(f"--{foreign[0]} belongs to {owners}, not to {work}")


def measure_table(args: argparse.Namespace) -> None:
    """Time every layer of the space on this machine and write the table."""
    from lut.device_table import device_named, measure

    space = get_space(args.space or "digits")
    check_new(args.out, args.overwrite)
    device = device_named(args.measure, args.bits, args.threads or 1)
    started = time.perf_counter()
    facts = measure(space, device, args.out, overwrite=args.overwrite)
    seconds = time.perf_counter() - started
    if args.json:
        print(json.dumps({"space": space.name, "file": str(args.out), "seconds": seconds, **facts}))
        return
    print(
        f"{args.out}: {facts['shapes']} shapes of layers of space {space.name}, timed in {seconds:.0f} s on "
        f"{facts['machine']} in {facts['runtime']} {facts['version']} at {facts['bits']} bits, {facts['threads']} "
        f"thread(s). Times of a layer differ by {facts['spread']:.0%} between passes. A call takes "
        f"{facts['call_ms']:.4f} ms, which are in no row"
    )


def write_table(args: argparse.Namespace) -> None:
    """Price every layer of the space and write the table."""
    space = get_space(args.space or "digits")
    check_new(args.out, args.overwrite)
    cost_model = cost_model_from_flags(args.config, None)
    started = time.perf_counter()
    priced = build(space, cost_model)
    seconds = time.perf_counter() - started
    write_json(args.out, priced)
    if args.json:
        print(json.dumps({"space": space.name, "file": str(args.out), "layers": len(priced) - 2, "seconds": seconds}))
    else:
        print(f"{args.out}: {len(priced) - 2} layers of space {space.name}, head and tail, in {seconds:.2f} s")


def print_model(args: argparse.Namespace) -> None:
    """Print the costs of a named network in each scope that it has."""
    network = network_named(args.model, args.bits, args.resolution)
    if network.experiment and not (args.config or args.table):
        cost_model = recorded_cost_model(network.experiment)
    else:
        cost_model = cost_model_from_flags(args.config, args.table)
    costs = {scope: cost_of(layers, cost_model) for scope, layers in network.layers.items()}
    rows = layer_rows(network.layers["full"], cost_model) if args.layers else []
    if args.json:
        result = {
            "model": args.model,
            "resolution": network.resolution,
            "costs": {scope: asdict(cost) for scope, cost in costs.items()},
            "unlisted_params": network.unlisted_params,
            "priced_by": str(cost_model),
        }
        print(json.dumps(result | ({"layers": rows} if args.layers else {})))
        return
    print(f"{network.title}, {network.resolution} x {network.resolution} pixels")
    if rows:
        print(table([tuple(rows[0]), *(tuple(shown(*item) for item in row.items()) for row in rows)]))
    print(table(cost_rows(by_scope(costs))))
    if network.unlisted_params:
        print(f"not counted: {network.unlisted_params:,} parameters outside these convolutions and linear layers")
    print(f"latency and energy: {cost_model}")


def layer_rows(layers: list[ConvLayer], cost_model: CostModel) -> list[dict[str, str | int | float | None]]:
    """One row for each layer. Its ms and mJ are None where they are not known."""
    return [
        {
            "layer": layer.name,
            "in": layer.in_channels,
            "out": layer.out_channels,
            "side": layer.input_size,
            "kernel": layer.kernel_size,
            "stride": layer.stride,
            "groups": layer.groups,
            "bits": f"W{layer.w_bits}A{layer.a_bits}",
            "ms": None if math.isnan(ms) else ms,
            "mJ": None if math.isnan(mj) else mj,
            "MACs": layer.macs,
            "params": layer.params,
            "bytes": layer.size_bytes,
        }
        for layer, (ms, mj) in zip(layers, cost_model.known_prices(layers).tolist(), strict=True)
    ]


def shown(key: str, value: str | int | float | None) -> str:
    """Format one cell of the printed table of layers."""
    if value is None:
        return "not known"
    return format(value, {"ms": ".5f", "mJ": ".5f", "bytes": ".1f"}.get(key, ""))


if __name__ == "__main__":
    run(main, "python -m lut", alone=True)
