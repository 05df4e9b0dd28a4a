"""How well do sums of measured layers rank whole networks?

--tables are cost tables that `python -m lut --measure RUNTIME --space SPACE --out FILE` wrote on this machine. Random
subnets of the space are run whole in the runtime of each table, with a chain of their layers (`lut.layer_chain`:
without shortcuts). Kendall's tau compares the order of their times with that of three predictions: the sum of measured
layers, BitFusion's latency, MACs. "Ratio" is predicted / measured, where the sum has one call of the runtime on top.

Seconds of different machines do not compare, and on a busy machine no two runs do.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import statistics

import numpy as np
from scipy.stats import kendalltau
from tqdm import tqdm

from apq.cli import Parser, add_common_flags, at_least, run
from apq.genes import sample, subnets_of
from apq.layers import ConvLayer, layers_of
from apq.presets import get_space
from benchmarks.machine import describe
from benchmarks.markdown import markdown
from lut.bitfusion import BitFusion
from lut.device_table import Device, Effort, device_of, median_ms
from lut.runtimes import runtime_named
from lut.table import PublishedTable, load

PREDICTIONS = ("sum of layers", "BitFusion", "MACs")


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--tables", type=Path, nargs="+", required=True, help="measured cost tables of the space")
    parser.add_argument("--space", default="digits", help="the space of the tables")
    parser.add_argument("--n_subnets", type=at_least(2), default=30, help="random subnets")
    parser.add_argument("--passes", type=at_least(1), default=7, help="passes over all subnets; medians count")
    add_common_flags(parser, device=False)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    space, tables = get_space(args.space), [load(path) for path in args.tables]
    devices = [device_of(table) for table in tables]
    genes = sample(space, args.n_subnets, np.random.default_rng(args.seed))
    networks = [layers_of(space, subnet) for subnet in subnets_of(space, genes)]
    effort, bitfusion = Effort(passes=args.passes), BitFusion()
    counted = {
        "BitFusion": [float(bitfusion.price(layers)[:, 0].sum()) for layers in networks],
        "MACs": [sum(layer.macs for layer in layers) for layers in networks],
    }
    results = [
        result_of(table, {"sum of layers": sums_of(table, networks), **counted}, measured(networks, device, effort))
        for table, device in zip(tables, devices, strict=True)
    ]
    if args.json:
        print(json.dumps({"space": space.name, "machine": describe(), "results": results}))
        return
    print({**describe(), "space": space.name, "subnets": len(networks)}, "\n")
    titles = ("table", *(f"tau, {name}" for name in PREDICTIONS), "measured ms", "ratio, median", "ratios")
    print(markdown(titles, [row_of(result) for result in results]))


def sums_of(table: PublishedTable, networks: list[list[ConvLayer]]) -> list[float]:
    """The milliseconds that the table predicts of each network, with one call of the runtime."""
    return [float(table.price(layers)[:, 0].sum()) + table.measured["call_ms"] for layers in networks]


def measured(networks: list[list[ConvLayer]], device: Device, effort: Effort) -> list[float]:
    """Milliseconds of each network as a whole: medians over passes, each in another order."""
    prepare, rng = runtime_named(device.runtime).prepare, np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in networks]
    for _ in tqdm(range(effort.passes), desc=device.runtime, unit="pass", disable=None):
        for i in rng.permutation(len(networks)):
            layers = [device.as_run(layer) for layer in networks[i]]
            times[i].append(median_ms(prepare(layers, device.threads), effort))
    return [statistics.median(of) for of in times]


def result_of(table: PublishedTable, predicted: dict[str, list[float]], ms: list[float]) -> dict[str, object]:
    """Figures of one table, as plain data."""
    taus = {name: float(kendalltau(values, ms).statistic) for name, values in predicted.items()}
    return {"table": str(table), "measured": table.measured, "kendall": taus, "predicted": predicted, "ms": ms}


def row_of(result: dict) -> tuple[str, ...]:
    """A row of the printed table."""
    ratios, ms = np.array(result["predicted"]["sum of layers"]) / result["ms"], result["ms"]
    taus = (f"{result['kendall'][name]:.2f}" for name in PREDICTIONS)
    shown = f"{min(ms):.3f} to {max(ms):.3f}", f"{np.median(ratios):.2f}", f"{ratios.min():.2f} to {ratios.max():.2f}"
    return result["table"], *taus, *shown


if __name__ == "__main__":
    run(main)
