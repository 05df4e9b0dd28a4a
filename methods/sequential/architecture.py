"""First stage of the sequential baseline: the most accurate float architecture within a budget at 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from apq.files import Record
from apq.genes import genes_of, subnets_of, view, with_highest_bits
from apq.layers import layers_of
from apq.space import SearchSpace
from apq.subnet import Subnet
from lut.cost_model import CostModel
from lut.costs import layer_quantity
from lut.population import PopulationCost
from methods.search.evolution_finder import EvolutionFinder, Found
from methods.sequential.config import ArchitectureSearch

SCOPE = "full"  # as in the search for bits, which traces all layers of the network


def at_highest_bits(space: SearchSpace) -> SearchSpace:
    """The space with the highest choice of bits alone."""
    kinds, shared = (
        tuple(replace(operand, choices=operand.choices[-1:]) for operand in operands)
        for operands in (space.operands, space.shared_operands)
    )
    return replace(space, operands=kinds, shared_operands=shared)


def in_full_space(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """Turn genes (n, genes) of `at_highest_bits(space)` into genes of the same networks in `space`."""
    full = np.zeros_like(genes)
    theirs, ours = view(at_highest_bits(space), genes), view(space, full)
    for part in ("ks", "e", "d", "resolution"):
        getattr(ours, part)[:] = getattr(theirs, part)
    return with_highest_bits(space, full)


def subnet_cost(space: SearchSpace, subnet: Subnet, quantity: str, cost_model: CostModel) -> float:
    """Cost of a subnet at its bits, in the unit of `quantity`. All three stages count in this way."""
    return float(layer_quantity(layers_of(space, subnet, SCOPE), quantity, cost_model).sum())


def search_architecture(
    space: SearchSpace,
    accuracy: Callable[[np.ndarray], np.ndarray],
    cost_model: CostModel,
    config: ArchitectureSearch,
    on_generation: Callable[[Record], None] | None = None,
) -> Found:
    """Evolutionary search among the networks of highest bits. The result is a subnet of `space`.

    `accuracy` takes genes (n, genes) of `space` and predicts float networks. `on_generation` is called with each
    record. UserError names the lowest cost if the budget is below it.
    """
    highest = at_highest_bits(space)
    costs = PopulationCost(highest, config.quantity, cost_model, SCOPE)
    finder = EvolutionFinder(
        highest,
        lambda genes: accuracy(in_full_space(space, genes)),
        costs.predict,
        config.budget,
        config.evolution,
        costs.cheapest_genes(),
        costs.unit,
    )
    found = finder.run(on_generation)
    (subnet,) = subnets_of(space, in_full_space(space, genes_of(highest, [found.subnet])))
    return replace(found, subnet=subnet)
