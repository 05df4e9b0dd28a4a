"""What one network costs, in both scopes: sums over the one list of its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from apq.layers import layers_of
from apq.space import SCOPES, SearchSpace
from apq.subnet import Subnet
from lut.accelerator import Accelerator
from lut.table import price


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Batch-1 cost of a network on an accelerator. `macs` are multiply-accumulates; sizes have BatchNorm folded."""

    latency_ms: float
    energy_mj: float
    bitops: int
    macs: int
    params: int
    size_bytes: float


def network_costs(space: SearchSpace, subnet: Subnet, accelerator: Accelerator | None = None) -> dict[str, NetworkCost]:
    """Cost in each scope: `published` leaves out the first inverted-residual block and the classifier."""
    costs = {}
    for scope in SCOPES:
        layers = layers_of(space, subnet, scope)
        latency_ms, energy_mj = price(layers, accelerator)
        costs[scope] = NetworkCost(
            latency_ms=float(latency_ms.sum()),
            energy_mj=float(energy_mj.sum()),
            bitops=sum(layer.bitops for layer in layers),
            macs=sum(layer.macs for layer in layers),
            params=sum(layer.params for layer in layers),
            size_bytes=sum(layer.size_bytes for layer in layers),
        )
    return costs


def cost_rows(costs: dict[str, NetworkCost]) -> list[tuple[str, ...]]:
    """The costs as rows of a printed table, one column a scope."""
    formats = {
        "latency_ms": ("latency, ms", "{:.4f}", 1),
        "energy_mj": ("energy, mJ", "{:.4f}", 1),
        "bitops": ("BitOps, M", "{:.1f}", 1e6),
        "macs": ("MACs, M", "{:.3f}", 1e6),
        "params": ("parameters, k", "{:.1f}", 1e3),
        "size_bytes": ("model size, kB", "{:.1f}", 1e3),
    }
    rows = [("cost", *(f"{scope} scope" for scope in costs))]
    for key, (title, template, unit) in formats.items():
        rows.append((title, *(template.format(asdict(cost)[key] / unit) for cost in costs.values())))
    return rows
