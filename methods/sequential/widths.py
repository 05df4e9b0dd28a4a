"""The environment of AMC's agent: from actions to mid channels within a budget (He et al., ECCV 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from apq.errors import UserError
from apq.layers import first_layers, last_layers, layers_of
from apq.operands import BLOCK_LAYERS
from apq.space import SearchSpace, Slot
from apq.subnet import Subnet
from lut.cost_model import CostModel
from lut.costs import UNITS, layer_quantity
from methods.search.bit_environment import action_to_bits, scaled_columns
from methods.sequential.architecture import SCOPE


def widths_of(space: SearchSpace, subnet: Subnet) -> np.ndarray:
    """(blocks,) mid channels of every block that runs."""
    return np.array([subnet.mid_channels(slot) for slot in subnet.running_slots(space)])


def with_widths(space: SearchSpace, subnet: Subnet, mid_channels: np.ndarray) -> Subnet:
    """The subnet with these mid channels (blocks,). UserError for channels that the space does not have."""
    ratios = list(subnet.e)
    for slot, mid in zip(subnet.running_slots(space), np.asarray(mid_channels).tolist(), strict=True):
        if mid not in slot.mid_channels:
            known = ", ".join(map(str, slot.mid_channels))
            raise UserError(f"block {slot.index + 1} of space {space.name} cannot have {mid} channels, only {known}")
        ratios[slot.index] = mid / slot.in_channels
    return replace(subnet, e=tuple(ratios))


@dataclass(frozen=True, kw_only=True)
class WidthEnvironment:
    """Gives mid channels to one block after the other, at most as many as it has.

    Candidates are mid channels (blocks,) whose network costs at most `budget`, in the unit of `quantity`, at the bits
    of the subnet. UserError if even the cheapest network costs more.

    Attributes:
        cells: (blocks, choices) cost of each block at each choice of mid channels, infinite above the present one.
        rest: cost of all other layers.
    """

    space: SearchSpace
    subnet: Subnet
    quantity: str
    budget: float
    cells: np.ndarray
    rest: float

    def __post_init__(self) -> None:
        if not self.budget > 0:
            raise UserError(f"the budget must be positive, not {self.budget}")
        if (lowest := self.cost(self._cheapest())) > self.budget:
            unit = UNITS[self.quantity]
            raise UserError(
                f"the budget of {self.budget:.6g} {unit} is below the narrowest network of this architecture, which "
                f"needs {lowest:.6g} {unit}"
            )

    def features(self) -> np.ndarray:
        """(blocks, 8) float64, each column scaled to 0 to 1: index of the block, input, mid and output channels,
        stride, kernel size, input side, MACs."""
        space, subnet = self.space, self.subnet
        sides, n_first = space.input_sides(subnet.resolution), len(first_layers(space, subnet.resolution, SCOPE))
        layers, n = layers_of(space, subnet, SCOPE), len(BLOCK_LAYERS)
        rows = []
        for i, (slot, mid) in enumerate(zip(subnet.running_slots(space), widths_of(space, subnet), strict=True)):
            macs = sum(layer.macs for layer in layers[n_first + n * i : n_first + n * (i + 1)])
            channels = slot.in_channels, mid, slot.out_channels
            rows.append((i, *channels, slot.stride, subnet.ks[slot.index], sides[slot.index], macs))
        return scaled_columns(rows)

    def decide(self, actions: np.ndarray) -> np.ndarray:
        """(blocks,) mid channels of actions (blocks,) from 0 to 1, lowered until they fit the budget."""
        choices = self._lowered(action_to_bits(actions, 0, self._present))
        return np.array([slot.mid_channels[c] for slot, c in zip(self._slots, choices, strict=True)])

    def cost_of_widths(self, mid_channels: np.ndarray) -> float:
        """Cost of the whole network with these mid channels (blocks,)."""
        pairs = zip(self._slots, np.asarray(mid_channels).tolist(), strict=True)
        return self.cost(np.array([slot.mid_channels.index(mid) for slot, mid in pairs]))

    def cost(self, choices: np.ndarray) -> float:
        """Cost of the whole network with these choices (blocks,) of mid channels."""
        return float(self.cells[np.arange(len(choices)), choices].sum() + self.rest)

    def _lowered(self, choices: np.ndarray) -> np.ndarray:
        """Lower choices (blocks,) until their cost fits the budget.

        Sweeps go from the last block to the first and lower each choice by one. On an accelerator fewer channels may
        cost more; such a step is not taken. When no step can be taken, all blocks get their cheapest choice.
        """
        blocks, total = np.arange(len(choices)), self.cost(choices)
        while total > self.budget:
            lower = np.maximum(choices - 1, 0)
            change = self.cells[blocks, lower] - self.cells[blocks, choices]
            lower = np.where(change > 0, choices, lower)
            if (lower == choices).all():
                return self._cheapest()
            after = total + np.minimum(change, 0)[::-1].cumsum()
            fits = np.flatnonzero(after <= self.budget)
            n_lowered = int(fits[0]) + 1 if len(fits) else len(choices)
            choices = np.where(blocks >= len(choices) - n_lowered, lower, choices)
            total = self.cost(choices)
        return choices

    def _cheapest(self) -> np.ndarray:
        """(blocks,) choices of lowest cost, the widest of equal ones."""
        return self.cells.shape[1] - 1 - self.cells[:, ::-1].argmin(axis=1)

    @property
    def _slots(self) -> list[Slot]:
        return self.subnet.running_slots(self.space)

    @property
    def _present(self) -> np.ndarray:
        return np.isfinite(self.cells).sum(axis=1) - 1


def width_environment(
    space: SearchSpace, subnet: Subnet, quantity: str, cost_model: CostModel, budget: float
) -> WidthEnvironment:
    """Price every block of a subnet at all choices of mid channels up to the present one."""
    slots, present = subnet.running_slots(space), widths_of(space, subnet)
    most = max(len(slot.mid_channels) for slot in slots)
    # One network for each choice: every block has that choice, or its last one if it has fewer.
    networks = [[slot.mid_channels[min(j, len(slot.mid_channels) - 1)] for slot in slots] for j in range(most)]
    layers = [layers_of(space, with_widths(space, subnet, widths), SCOPE) for widths in networks]
    costs = layer_quantity([layer for row in layers for layer in row], quantity, cost_model)
    costs = costs.reshape(most, -1)  # (choices, layers)
    ends = len(first_layers(space, subnet.resolution, SCOPE)), -len(last_layers(space, subnet.resolution, SCOPE))
    blocks = costs[:, slice(*ends)].reshape(most, len(slots), len(BLOCK_LAYERS)).sum(axis=2).T  # (blocks, choices)
    allowed = np.arange(most) <= [[slot.mid_channels.index(mid)] for slot, mid in zip(slots, present, strict=True)]
    return WidthEnvironment(
        space=space,
        subnet=subnet,
        quantity=quantity,
        budget=budget,
        cells=np.where(allowed, blocks, np.inf),
        rest=float(costs[0, : ends[0]].sum() + costs[0, ends[1] :].sum()),
    )
