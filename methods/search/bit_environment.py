"""The environment of HAQ's agent: from actions to bits within a budget (Wang et al., CVPR 2019, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from methods.search.bit_choices import FREE, BitChoices
from methods.search.observations import Observations


def action_to_bits(actions: np.ndarray, min_bit: int, max_bit: int | np.ndarray) -> np.ndarray:
    """Turn actions from 0 to 1 into bits: all bit-widths have equal intervals of actions.

    `max_bit` may differ between actions. Ties are rounded to even.

    >>> action_to_bits(np.array([0.0, 0.3, 1.0]), 2, 8)
    array([2, 4, 8])
    """
    bits = np.round((max_bit - min_bit + 1) * np.asarray(actions) + min_bit - 0.5).astype(np.int64)
    return np.clip(bits, min_bit, max_bit)


def scaled_columns(rows: Sequence[Sequence[float]], *, keep_constant: bool = False) -> np.ndarray:
    """(rows, columns) float64, each column shifted and scaled to 0 to 1.

    A constant column becomes 0, or with `keep_constant` stays as it is.
    """
    table = np.array(rows, dtype=np.float64)
    low, high = table.min(axis=0), table.max(axis=0)
    varies = high > low
    scaled = (table - low) / np.where(varies, high - low, 1)
    return np.where(varies, scaled, table) if keep_constant else scaled


@dataclass(frozen=True, kw_only=True)
class BitEnvironment(BitChoices):
    """Gives bits to one layer after the other, first to its weights, then to its activations.

    With `every_operand` the agent also takes a step for each operand whose bits are fixed, as in HAQ's code. The next
    step observes what it chose, but the operand keeps its fixed bits.
    """

    every_operand: bool = False

    @property
    def steps(self) -> np.ndarray:
        """(steps, 2) layer and operand (0 weights, 1 activations) of each step."""
        return np.argwhere((self.fixed == FREE) | self.every_operand)

    def layer_rows(self) -> np.ndarray:
        """(layers, 10 or 9) float64, HAQ's initial state of each layer.

        The columns are depthwise, input channels, output channels, stride, kernel size, weights, places of the input,
        index of the layer, last action and, with activations, the flag. Each is scaled to 0 to 1 over all layers, but
        for constant ones. A linear layer has stride 0 and as many places as inputs.
        """
        start = (1.0, 1.0) if self.activations else (4.0,)  # last action (and flag) before an episode, as in HAQ's code
        rows = []
        for i, layer in enumerate(self.layers):
            depthwise = not layer.linear and layer.in_channels == layer.groups
            stride = 0 if layer.linear else layer.stride
            places = layer.in_channels if layer.linear else layer.input_size**2
            sizes = stride, layer.kernel_size, layer.weights, places
            rows.append((depthwise, layer.in_channels, layer.out_channels, *sizes, i, *start))
        return scaled_columns(rows, keep_constant=True)

    def observations(self) -> Observations:
        """What the agent observes before each step: the row of the layer, with the bits of the step before.

        Bits are those that were taken, before they are lowered to the budget: as a fraction of the most with
        activations, else as they are. The flag is 1 before activations and 0 before weights, but 1 in the first step.
        All this is as in HAQ's code, for whatever operands have steps.
        """
        steps, rows = self.steps, self.layer_rows()[self.steps[:, 0]]
        if self.activations:
            rows[1:, -1] = steps[1:, 1]
        unit = self.max_bit if self.activations else 1
        return Observations(
            rows=rows,
            last=-2 if self.activations else -1,
            taken=lambda actions: action_to_bits(actions, self.min_bit, self.max_bit) / unit,
            carried=self.activations,
        )

    def raw_bits(self, actions: np.ndarray) -> np.ndarray:
        """(layers, 2 or 1) the bits of actions (steps,) from 0 to 1, before they are lowered to the budget."""
        bits = self.fixed.copy()
        bits[tuple(self.steps.T)] = action_to_bits(actions, self.min_bit, self.max_bit)
        return np.where(self.fixed == FREE, bits, self.fixed)

    def decide(self, actions: np.ndarray) -> np.ndarray:
        """The bits of actions (steps,) from 0 to 1, lowered until they fit the budget."""
        return self.lowered(self.raw_bits(actions))

    def lowered(self, bits: np.ndarray) -> np.ndarray:
        """Lower bits until their cost fits the budget.

        Sweeps go from the last layer to the first. They take one bit from the activations of a layer, then one from its
        weights. On an accelerator fewer bits may cost more; such a bit is not taken. When no bit can be taken, layers
        get their cheapest bits, those that save most first.
        """
        bits = bits.copy()
        total = self.costs.total(bits)
        while total > self.budget:
            # The cost after each step of a sweep is a cumulative sum, from the last layer's activations on.
            lower, steps = bits, []
            for operand in reversed(range(bits.shape[1])):
                lower, change = self._step(lower, operand)
                steps.append(change)
            if (lower == bits).all():
                return self._cheapened(bits)
            after = total + np.cumsum(np.stack(steps, axis=1)[::-1])
            fits = np.flatnonzero(after <= self.budget)
            if not len(fits):
                bits, total = lower, self.costs.total(lower)
                continue
            n_whole, half = divmod(int(fits[0]) + 1, bits.shape[1])  # whole layers; one more layer's activations
            at = len(bits) - n_whole
            bits[at:] = lower[at:]
            if half:
                bits[at - 1, 1:] = lower[at - 1, 1:]
            return bits
        return bits

    def _cheapened(self, bits: np.ndarray) -> np.ndarray:
        """Give as few layers as possible their cheapest bits, where single bits cannot be taken."""
        cheapest = self.cheapest()
        saved = self.costs.per_layer(bits) - self.costs.per_layer(cheapest)
        order = np.argsort(-saved, kind="stable")
        after = self.costs.total(bits) - np.cumsum(saved[order])
        chosen = order[: int(np.argmax(after <= self.budget)) + 1] if (after <= self.budget).any() else order
        bits[chosen] = cheapest[chosen]
        return bits

    def _step(self, bits: np.ndarray, operand: int) -> tuple[np.ndarray, np.ndarray]:
        """Take one bit from an operand of each layer where that is allowed and costs no more.

        Returns the bits and (layers,) changes of cost.
        """
        lower = bits.copy()
        lower[:, operand] -= (self.fixed[:, operand] == FREE) & (bits[:, operand] > self.min_bit)
        change = self.costs.per_layer(lower) - self.costs.per_layer(bits)
        costs_more = change > 0
        return np.where(costs_more[:, None], bits, lower), np.where(costs_more, 0.0, change)
