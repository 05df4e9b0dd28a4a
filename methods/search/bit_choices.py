"""The bits that a search for a policy may choose, and their costs: the range, what is fixed, the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apq.errors import UserError
from apq.layers import FIXED_BITS, ConvLayer
from lut.bit_costs import BitCosts

FREE = 0  # marks bits that are chosen, in a matrix of fixed bits


class BudgetError(UserError):
    """A budget is below the cost of the cheapest bits."""


def fixed_bits(n_layers: int, *, activations: bool, keep_ends: bool) -> np.ndarray:
    """(layers, 2 or 1) bits that are not chosen, or FREE: 8 for the input of the first layer, the image, and with
    `keep_ends` 8 for all operands of the first and the last layer."""
    fixed = np.full((n_layers, 2 if activations else 1), FREE)
    if activations:
        fixed[0, 1] = FIXED_BITS
    if keep_ends:
        fixed[[0, -1]] = FIXED_BITS
    return fixed


@dataclass(frozen=True, kw_only=True)
class BitChoices:
    """The bits of every layer's operands that may be chosen, and the budget.

    `fixed` has the bits that are not chosen, see `fixed_bits`. Candidates are bits (layers, 2 or 1) that cost at most
    `budget`. BudgetError if even the cheapest bits cost more. UserError if there is nothing to choose, or if costs of
    bits that may be chosen are not known.
    """

    layers: Sequence[ConvLayer]  # one a row of `costs`
    costs: BitCosts
    budget: float
    fixed: np.ndarray
    min_bit: int
    max_bit: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_bit <= self.max_bit <= 8:
            raise UserError(f"bits must be from 1 to 8, not {self.min_bit} to {self.max_bit}")
        if not (self.fixed == FREE).any():
            raise UserError(f"the network's {len(self.layers)} layers are all kept at 8 bits: nothing to choose")
        cells = self.allowed_cells()
        if np.isnan(cells).any():
            layer = int(np.argwhere(np.isnan(cells))[0][0])
            raise UserError(f"the cost table lacks layer {layer} ({self.layers[layer].name}) at some of its bits")
        if (lowest := self.costs.total(self.cheapest())) > self.budget:
            raise BudgetError(
                f"the budget of {self.budget:.6g} {self.costs.unit} is below the cheapest policy, which needs "
                f"{lowest:.6g} {self.costs.unit}, {lowest / self.costs.reference:.4g} of {self.costs.of_what}"
            )

    @property
    def activations(self) -> bool:
        """Whether activations have bits, too."""
        return self.fixed.shape[1] > 1

    def most(self) -> float:
        """The highest cost of all allowed bits."""
        cells = self.allowed_cells()
        return float(np.where(np.isfinite(cells), cells, 0).max(axis=(1, 2)).sum())

    def cheapest(self) -> np.ndarray:
        """The bits of lowest cost, the most bits of equal ones."""
        cells = self.allowed_cells()
        flat = cells.reshape(len(cells), -1)[:, ::-1]
        place = flat.shape[1] - 1 - flat.argmin(axis=1)
        return np.stack(np.unravel_index(place, cells.shape[1:]), axis=1)[:, : self.fixed.shape[1]] + 1

    def allowed_cells(self) -> np.ndarray:
        """(layers, 8, 8 or 1) the cost cells, infinite for bits that are not allowed."""
        cells = self.costs.cells.copy()
        numbers = np.arange(1, 9)
        for operand in range(self.fixed.shape[1]):
            fixed = self.fixed[:, operand, None]
            allowed = np.where(fixed == FREE, (numbers >= self.min_bit) & (numbers <= self.max_bit), numbers == fixed)
            mask = allowed[:, :, None] if operand == 0 else allowed[:, None, :]
            cells = np.where(mask, cells, np.inf)
        return cells
