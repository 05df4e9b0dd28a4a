"""The cost of one network: sums over its list of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from apq.errors import UserError
from apq.genes import largest_subnet
from apq.layers import ConvLayer, layers_of
from apq.space import SCOPES, SearchSpace
from apq.subnet import Subnet
from lut.cost_model import COLUMN, UNITS, CostModel, counted

PRICED = tuple(COLUMN)  # quantities that a cost model gives; the others are counted


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Cost of a network, at batch 1 unless the cost model says otherwise.

    `weighted_flops`, which OQA counts, are MACs x weight bits x activation bits / 64. In `size_bytes` BatchNorm is
    folded. Latency and energy are None where they are not known of all layers.
    """

    latency_ms: float | None
    energy_mj: float | None
    bitops: int
    macs: int
    weighted_flops: float
    params: int
    size_bytes: float


def network_costs(space: SearchSpace, subnet: Subnet, cost_model: CostModel) -> dict[str, NetworkCost]:
    """Cost of a subnet in each scope. `published` leaves out the first inverted-residual block and the classifier."""
    return {scope: cost_of(layers_of(space, subnet, scope), cost_model) for scope in SCOPES}


def cost_of(layers: Sequence[ConvLayer], cost_model: CostModel) -> NetworkCost:
    """Cost of a network of these layers."""
    ms, mj = cost_model.known_prices(layers).sum(axis=0).tolist()
    return NetworkCost(
        latency_ms=None if math.isnan(ms) else ms,
        energy_mj=None if math.isnan(mj) else mj,
        bitops=sum(layer.bitops for layer in layers),
        macs=sum(layer.macs for layer in layers),
        weighted_flops=sum(layer.weighted_flops for layer in layers),
        params=sum(layer.params for layer in layers),
        size_bytes=sum(layer.size_bytes for layer in layers),
    )


def layer_quantity(layers: Sequence[ConvLayer], quantity: str, cost_model: CostModel | None = None) -> np.ndarray:
    """(layers,) float64 cost of each layer in `UNITS[quantity]`.

    Latency and energy come from `cost_model`; the other quantities are counted and need none. UserError for an unknown
    quantity, for latency or energy without a cost model, and where the model does not cover a layer.
    """
    check_quantity(quantity, cost_model)
    if cost_model is None:
        return counted(quantity, layers)
    costs = cost_model.costs_of(quantity, layers)
    if np.isnan(costs).any():
        cost_model.price(layers)  # names the first layer that is not covered
        raise UserError(f"{cost_model} has no {quantity} of layers")  # a table of latencies has no energies
    return costs


def why_not_priced(space: SearchSpace, cost_model: CostModel) -> str:
    """Why a cost model cannot price the networks of a space, for example because of their bits; "" where it can.

    The largest network at the highest bits is priced: it has the largest of all sizes. A table may lack rows.
    """
    try:
        cost_model.known_prices(layers_of(space, largest_subnet(space)))
    except UserError as error:
        return f"{cost_model} has no costs for space {space.name}: {error}"
    return ""


def check_priced(space: SearchSpace, cost_model: CostModel) -> None:
    """UserError where a cost model cannot price the networks of a space, which every report of a search does."""
    if problem := why_not_priced(space, cost_model):
        raise UserError(f"{problem}; give another cost model with --config or --table")


def check_quantity(quantity: str, cost_model: CostModel | None) -> None:
    """UserError for a quantity that `UNITS` does not have, and for latency or energy without a cost model."""
    if quantity not in UNITS:
        raise UserError(f"unknown cost type {quantity!r}; known: {', '.join(UNITS)}")
    if quantity in PRICED and cost_model is None:
        raise UserError(f"{quantity} needs a cost model")


def by_scope(costs: dict[str, NetworkCost]) -> dict[str, NetworkCost]:
    """The costs under the titles of the scopes in a printed table."""
    return {f"{scope} scope": cost for scope, cost in costs.items()}


def cost_rows(costs: dict[str, NetworkCost]) -> list[tuple[str, ...]]:
    """Rows of a printed table, with one column for each network cost."""
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
        rows.append((title, *("not known" if value is None else template.format(value / unit) for value in values)))
    return rows
