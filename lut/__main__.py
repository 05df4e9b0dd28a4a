"""Costs of networks and layers on an accelerator: latency in ms and energy in mJ.

python -m lut --model NAME                    print the costs of a network. NAME: a classification model of torchvision,
                                              mobilenet_v2_small or another own network of train.py, exps/NAME (found
                                              by a search), SPACE:largest or SPACE:smallest
python -m lut --space SPACE --out FILE        write the cost table of a space: all layers that its networks can have
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
from lut.table import build

MODEL_FLAGS = ("bits", "resolution", "layers", "table")  # belong to --model
SPACE_FLAGS = ("space", "out", "overwrite")


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m lut")
    parser.add_argument("--model", metavar="NAME", help="network to print the costs of")
    parser.add_argument(
        "--bits",
        type=bits,
        metavar="W|WxA",
        help="bits of weights and activations of --model (default: 8, or the highest of its space)",
    )
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
    foreign = SPACE_FLAGS if args.model else MODEL_FLAGS
    if given := [f"--{flag}" for flag in foreign if getattr(args, flag)]:
        owner = "writing the table of a space, not to --model" if args.model else "--model, which is not given"
        raise UserError(f"{given[0]} belongs to {owner}")
    if args.model:
        print_model(args)
    elif args.out:
        write_table(args)
    else:
        raise UserError("give --model NAME to print a network's costs, or --space SPACE --out FILE to write a table")


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
