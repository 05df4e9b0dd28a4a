"""What one network costs: sums over the one list of its layers, and where their prices come from."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.experiment import Experiment
from apq.layers import ConvLayer, layers_of
from apq.space import SCOPES, SearchSpace
from apq.subnet import Subnet
from lut.accelerator import Accelerator, accelerator_from_dict, accelerator_from_json, describe
from lut.table import PublishedTable, load, price


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Batch-1 cost of a network. `macs` are multiply-accumulates; `weighted_flops`, which OQA counts, are
    MACs x w x a / 64. Sizes have BatchNorm folded.

    Latency and energy are None where they come from a table that lacks some of the layers.
    """

    latency_ms: float | None
    energy_mj: float | None
    bitops: int
    macs: int
    weighted_flops: float
    params: int
    size_bytes: float


@dataclass(frozen=True, kw_only=True)
class CostSource:
    """Where latency and energy come from: the BitFusion model of an accelerator, or a table that replaces it."""

    accelerator: Accelerator
    table: PublishedTable | None = None

    def __str__(self) -> str:
        return describe(self.accelerator) if self.table is None else f"table {self.table.path}"

    def record(self) -> dict[str, Any]:
        """Plain data, for the config.json of an experiment."""
        return {"accelerator": asdict(self.accelerator), "table": self.table and str(self.table.path)}


def add_cost_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --config and --table, of which one may be given; `default` tells what holds without them."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, help=f"accelerator as a JSON file (default: {default})")
    source.add_argument("--table", type=Path, help="cost table of your own device, in the published JSON form")


def cost_source(config: Path | None, table: Path | None) -> CostSource:
    """What the flags of `add_cost_flags` ask for; without any the published BitFusion."""
    accelerator = accelerator_from_json(config) if config else Accelerator()
    return CostSource(accelerator=accelerator, table=load(table) if table else None)


def recorded_cost_source(experiment: Experiment) -> CostSource:
    """What the search of an experiment priced its candidates with."""
    config = experiment.load_config()
    accelerator = accelerator_from_dict(config["accelerator"], experiment.config)
    if config["table"] is None:
        return CostSource(accelerator=accelerator)
    try:
        return CostSource(accelerator=accelerator, table=load(Path(config["table"])))
    except UserError as error:
        raise UserError(f"{error}; the search of {experiment.path} used this table: give it with --table") from error


def network_costs(space: SearchSpace, subnet: Subnet, source: CostSource) -> dict[str, NetworkCost]:
    """Cost in each scope: `published` leaves out the first inverted-residual block and the classifier."""
    return {scope: cost_of(layers_of(space, subnet, scope), source) for scope in SCOPES}


def cost_of(layers: Sequence[ConvLayer], source: CostSource) -> NetworkCost:
    """Cost of a network of these layers."""
    ms, mj = prices(layers, source).sum(axis=0).tolist()
    return NetworkCost(
        latency_ms=None if math.isnan(ms) else ms,
        energy_mj=None if math.isnan(mj) else mj,
        bitops=sum(layer.bitops for layer in layers),
        macs=sum(layer.macs for layer in layers),
        weighted_flops=sum(layer.weighted_flops for layer in layers),
        params=sum(layer.params for layer in layers),
        size_bytes=sum(layer.size_bytes for layer in layers),
    )


def prices(layers: Sequence[ConvLayer], source: CostSource) -> np.ndarray:
    """(layers, 2) float64 milliseconds and millijoules of each layer; NaN where a table lacks it."""
    if source.table is None:
        return np.stack(price(layers, source.accelerator), axis=1)
    rows = [source.table.lookup([layer]) if source.table.covers([layer]) else None for layer in layers]
    found = [(math.nan, math.nan) if row is None else (row.latency_ms[0], row.energy_mj[0]) for row in rows]
    return np.array(found).reshape(len(layers), 2)


def by_scope(costs: dict[str, NetworkCost]) -> dict[str, NetworkCost]:
    """The costs of scopes under the titles of a printed table."""
    return {f"{scope} scope": cost for scope, cost in costs.items()}


def cost_rows(costs: dict[str, NetworkCost]) -> list[tuple[str, ...]]:
    """The costs as rows of a printed table, one column each."""
    formats = {
        "latency_ms": ("latency, ms", "{:.4f}", 1),
        "energy_mj": ("energy, mJ", "{:.4f}", 1),
        "bitops": ("BitOps, M", "{:.1f}", 1e6),
        "macs": ("MACs, M", "{:.3f}", 1e6),
        "weighted_flops": ("MACs w a / 64, M", "{:.3f}", 1e6),
        "params": ("parameters, k", "{:.1f}", 1e3),
        "size_bytes": ("model size, kB", "{:.1f}", 1e3),
    }
    rows = [("cost", *costs)]
    for key, (title, template, unit) in formats.items():
        values = [asdict(cost)[key] for cost in costs.values()]
        rows.append((title, *("not in table" if value is None else template.format(value / unit) for value in values)))
    return rows
