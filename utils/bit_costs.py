"""What every layer of a network costs at every choice of bits, so that pricing a policy is one gather."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apq.errors import UserError
from apq.layers import ConvLayer
from apq.policy import layer_names
from lut.costs import CostSource
from utils.latency_predictor import UNITS, layer_costs

MOST_BITS = 8
FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class BitCosts:
    """`cells[layer, w - 1, a - 1]` is a layer's cost in `unit` at w weight and a activation bits, up to 8; without
    activation bits the last axis has length 1. `reference` is the cost that ratios are of: `of_what`."""

    cells: np.ndarray  # (layers, 8, 8 or 1) float64
    unit: str
    reference: float
    of_what: str

    def per_layer(self, bits: np.ndarray) -> np.ndarray:
        """(layers,) costs of bits (layers, 2 or 1)."""
        return self.cells[np.arange(len(bits)), bits[:, 0] - 1, bits[:, 1] - 1 if bits.shape[1] > 1 else 0]

    def total(self, bits: np.ndarray) -> float:
        """Cost of the whole network, or of those layers that a table prices."""
        return float(np.nansum(self.per_layer(bits)))

    def check_priced(self, bits: np.ndarray) -> None:
        """UserError if a layer has a price at 8 bits but none at these."""
        lacking = np.isnan(self.per_layer(bits)) & ~np.isnan(self.cells[:, -1, -1])
        if lacking.any():
            layer = int(lacking.argmax())
            raise UserError(f"the table of costs lacks layer {layer} at its bits, {bits[layer].tolist()}")

    @property
    def n_priced(self) -> int:
        """How many layers have prices."""
        return int((~np.isnan(self.cells[:, -1, -1])).sum())

    def ratio(self, bits: np.ndarray) -> float:
        """Share of the reference cost."""
        return self.total(bits) / self.reference


def linear_costs(layers: Sequence[ConvLayer], quantity: str, source: CostSource) -> BitCosts:
    """Costs with quantized weights and activations, of `quantity`, one of UNITS; ratios are of the 8-bit network.

    UserError if a table of costs lacks a layer at some bits.
    """
    choices = [(w, a) for w in range(1, MOST_BITS + 1) for a in range(1, MOST_BITS + 1)]
    at_bits = [replace(layer, w_bits=w, a_bits=a) for layer in layers for w, a in choices]
    costs = layer_costs(at_bits, quantity, source.accelerator, source.table)
    cells = _sum_by_name(layers, costs.reshape(len(layers), MOST_BITS, MOST_BITS))
    return BitCosts(
        cells=cells, unit=UNITS[quantity], reference=float(cells[:, -1, -1].sum()), of_what="the 8-bit cost"
    )


def kmeans_costs(layers: Sequence[ConvLayer]) -> BitCosts:
    """Bytes of the weights alone, as HAQ counts: no biases, no codebooks; ratios are of 32-bit weights."""
    weights = _sum_by_name(layers, np.array([0 if layer.shared else layer.weights for layer in layers]))
    cells = weights[:, None, None] * np.arange(1, MOST_BITS + 1)[:, None] / 8
    return BitCosts(
        cells=cells, unit="bytes", reference=float(weights.sum() * FLOAT_BITS / 8), of_what="the 32-bit weights"
    )


def measured_costs(path: Path, n_layers: int, unit: str) -> BitCosts:
    """Costs that were measured, in HAQ's form: a CSV file of layer number, weight bits, activation bits and cost.

    The first line may name the columns. Cells that the file lacks are NaN; UserError where it is not such a file.
    """
    cells = np.full((n_layers, MOST_BITS, MOST_BITS), np.nan)
    try:
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
            for layer, w, a, cost in rows[1:] if rows and rows[0][:1] == ["layer"] else rows:
                cells[_index(layer, n_layers), _index(w, MOST_BITS, 1), _index(a, MOST_BITS, 1)] = _cost(cost)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table of layer,w_bits,a_bits,cost for {n_layers} layers: {error}") from error
    return BitCosts(cells=cells, unit=unit, reference=float(np.nansum(cells[:, -1, -1])), of_what="the 8-bit cost")


def _cost(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(f"a cost of {text}")
    return value


def _index(text: str, n: int, first: int = 0) -> int:
    value = int(text) - first
    if not 0 <= value < n:
        raise ValueError(f"{text} is not from {first} to {n - 1 + first}")
    return value


def _sum_by_name(layers: Sequence[ConvLayer], values: np.ndarray) -> np.ndarray:
    """One row a name: a layer that runs twice costs twice."""
    names = layer_names(layers)
    rows = [names.index(layer.name) for layer in layers]
    total = np.zeros((len(names), *values.shape[1:]), dtype=values.dtype)
    np.add.at(total, rows, values)
    return total
