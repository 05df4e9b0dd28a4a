"""The cost of every layer of a network at every bit-width, so that pricing a policy is one gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from apq.errors import UserError
from apq.layers import ConvLayer
from apq.policy import first_runs, layer_names
from lut.cost_model import CostModel
from lut.costs import check_quantity
from lut.measured import MOST_BITS

FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class BitCosts:
    """Costs of the layers of a network at 1 to 8 bits.

    `cells[layer, w - 1, a - 1]` is the cost in `unit` at w weight bits and a activation bits, NaN where it is not
    known; without activation bits the last axis has length 1. Ratios are relative to `reference`, a cost that
    `of_what` names.
    """

    cells: np.ndarray  # (layers, 8, 8 or 1) float64
    unit: str
    reference: float
    of_what: str

    def per_layer(self, bits: np.ndarray) -> np.ndarray:
        """(layers,) costs of bits (layers, 2 or 1)."""
        return self.cells[np.arange(len(bits)), bits[:, 0] - 1, bits[:, 1] - 1 if bits.shape[1] > 1 else 0]

    def total(self, bits: np.ndarray) -> float:
        """Cost of the network. Layers without a known cost are left out."""
        return float(np.nansum(self.per_layer(bits)))

    def check_priced(self, bits: np.ndarray) -> None:
        """UserError if the cost of a layer is known at 8 bits but not at these."""
        lacking = np.isnan(self.per_layer(bits)) & ~np.isnan(self.cells[:, -1, -1])
        if lacking.any():
            layer = int(lacking.argmax())
            raise UserError(f"the cost table lacks layer {layer} at its bits, {bits[layer].tolist()}")

    @property
    def n_priced(self) -> int:
        """Number of layers whose costs are known."""
        return int((~np.isnan(self.cells[:, -1, -1])).sum())

    def ratio(self, bits: np.ndarray) -> float:
        """Cost as a fraction of the reference cost."""
        return self.total(bits) / self.reference


def linear_costs(layers: Sequence[ConvLayer], quantity: str, cost_model: CostModel) -> BitCosts:
    """Costs of `quantity`, one of UNITS, with quantized weights and activations. Ratios are to the 8-bit network.

    Costs that the model does not have are NaN. The reference is the cost of the layers that it has at 8 bits. UserError
    for an unknown quantity, and where the reference is not positive.
    """
    check_quantity(quantity, cost_model)
    if cost_model.of_all_runs:
        layers = first_runs(layers)
    choices = [(w, a) for w in range(1, MOST_BITS + 1) for a in range(1, MOST_BITS + 1)]
    at_bits = [replace(layer, w_bits=w, a_bits=a) for layer in layers for w, a in choices]
    costs = cost_model.costs_of(quantity, at_bits)
    cells = _sum_by_name(layers, costs.reshape(len(layers), MOST_BITS, MOST_BITS))
    reference = float(np.nansum(cells[:, -1, -1]))
    if not reference > 0:
        raise UserError(f"{cost_model} has no {quantity} of a layer at 8 bits, which costs are compared with")
    return BitCosts(cells=cells, unit=cost_model.unit_of(quantity), reference=reference, of_what="the 8-bit cost")


def weight_costs(layers: Sequence[ConvLayer], n_weights: Sequence[int] | None = None) -> BitCosts:
    """Bytes of the weights, as HAQ counts them: without biases and codebooks. Ratios are to 32-bit weights.

    `n_weights` are the weights that count, one for each name, such as those of a pruned network that are not zero
    (None: all).
    """
    weights = _sum_by_name(layers, np.array([0 if layer.shared else layer.weights for layer in layers]))
    if n_weights is not None:
        weights = np.array(n_weights)
    cells = weights[:, None, None] * np.arange(1, MOST_BITS + 1)[:, None] / 8
    return BitCosts(
        cells=cells, unit="bytes", reference=float(weights.sum() * FLOAT_BITS / 8), of_what="the 32-bit weights"
    )


def _sum_by_name(layers: Sequence[ConvLayer], values: np.ndarray) -> np.ndarray:
    """(names, ...) sums over the layers of one name: a layer that runs twice costs twice."""
    names = layer_names(layers)
    rows = [names.index(layer.name) for layer in layers]
    total = np.zeros((len(names), *values.shape[1:]), dtype=values.dtype)
    np.add.at(total, rows, values)
    return total
