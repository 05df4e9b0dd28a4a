"""Gene matrices: a population as one int array `(n, genes)` of choice indices.

Columns, in order: kernel of every slot, mid channels of every slot, bits of every slot for each operand kind, depth of
every stage, bits of every shared operand, resolution. A row is *canonical* when its idle slots, those that do not run,
hold the defaults: smallest kernel, fewest mid channels, highest bits. Equal networks then have equal rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.schema import array
from apq.space import SearchSpace
from apq.subnet import Subnet

MAX_REDRAWS = 1000


@dataclass(frozen=True)
class GeneView:
    """The parts of a gene matrix as NumPy views. Writing to them writes to the matrix."""

    ks: np.ndarray  # (n, slots)
    e: np.ndarray  # (n, slots)
    bits: np.ndarray  # (n, kinds, slots)
    d: np.ndarray  # (n, stages)
    shared_bits: np.ndarray  # (n, shared operands)
    resolution: np.ndarray  # (n,)


def view(space: SearchSpace, genes: np.ndarray) -> GeneView:
    """Split a matrix `(n, genes)` into its parts without copying."""
    n, slots, kinds, stages = len(genes), len(space.slots), len(space.operands), len(space.stages)
    bits_end = (2 + kinds) * slots
    return GeneView(
        ks=genes[:, :slots],
        e=genes[:, slots : 2 * slots],
        bits=genes[:, 2 * slots : bits_end].reshape(n, kinds, slots),
        d=genes[:, bits_end : bits_end + stages],
        shared_bits=genes[:, bits_end + stages : -1],
        resolution=genes[:, -1],
    )


@lru_cache(maxsize=64)
def cardinalities(space: SearchSpace) -> np.ndarray:
    """(genes,) number of choices of every column."""
    slots = len(space.slots)
    counts = [len(space.kernel_sizes)] * slots + [len(slot.mid_channels) for slot in space.slots]
    for kind in space.operands:
        counts += [len(kind.choices)] * slots
    counts += [len(stage.depths) for stage in space.stages]
    counts += [len(shared.choices) for shared in space.shared_operands]
    return _frozen(np.array([*counts, len(space.resolutions)]))


@lru_cache(maxsize=64)
def _defaults(space: SearchSpace) -> np.ndarray:
    defaults = np.zeros_like(cardinalities(space))[None]
    for k, kind in enumerate(space.operands):
        view(space, defaults).bits[:, k] = len(kind.choices) - 1
    return _frozen(defaults[0])


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@lru_cache(maxsize=64)
def _depth_table(space: SearchSpace) -> np.ndarray:
    """(stages, most choices) depth of every depth gene."""
    table = np.zeros((len(space.stages), max(len(stage.depths) for stage in space.stages)), dtype=np.int64)
    for row, stage in zip(table, space.stages, strict=True):
        row[: len(stage.depths)] = stage.depths
    return table


def active(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """(n, slots) bool: which slots run."""
    depths = _depth_table(space)[np.arange(len(space.stages)), view(space, genes).d]  # (n, stages)
    return space.runs(depths)


def canonical(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """A copy in which idle slots hold the defaults: (n, genes) -> same."""
    genes = genes.copy()
    per_slot = (2 + len(space.operands)) * len(space.slots)
    idle = np.tile(~active(space, genes), 2 + len(space.operands))  # (n, per_slot)
    genes[:, :per_slot] = np.where(idle, _defaults(space)[:per_slot], genes[:, :per_slot])
    return genes


def forbidden_slots(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """(n, slots) bool: which slots, running or idle, break a rule of the space."""
    parts = view(space, genes)
    broken = np.zeros(parts.ks.shape, dtype=bool)
    for rule in space.forbidden:
        k = next(i for i, kind in enumerate(space.operands) if kind.name == rule.operand)
        if rule.kernel_size in space.kernel_sizes and rule.bits in space.operands[k].choices:
            kernel_gene = space.kernel_sizes.index(rule.kernel_size)
            bits_gene = space.operands[k].choices.index(rule.bits)
            broken |= (parts.ks == kernel_gene) & (parts.bits[:, k] == bits_gene)
    return broken


def legalise(space: SearchSpace, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A canonical copy in which the kernel and bits of forbidden slots are redrawn until they are legal.

    UserError after `MAX_REDRAWS` rounds.
    """
    genes = canonical(space, genes)
    parts = view(space, genes)
    for _ in range(MAX_REDRAWS):
        rows, slots = np.nonzero(forbidden_slots(space, genes))
        if not len(rows):
            return genes
        parts.ks[rows, slots] = rng.integers(len(space.kernel_sizes), size=len(rows))
        for k, kind in enumerate(space.operands):
            parts.bits[rows, k, slots] = rng.integers(len(kind.choices), size=len(rows))
    raise UserError(f"the rules of space {space.name} leave (almost) no legal block")


def sample(space: SearchSpace, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, genes) legal canonical rows, with every choice drawn uniformly."""
    return legalise(space, rng.integers(cardinalities(space), size=(n, len(cardinalities(space)))), rng)


def with_highest_bits(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """The same architectures at their highest bits, as float networks are recorded: (n, genes) -> same."""
    genes, counts = genes.copy(), view(space, cardinalities(space)[None])
    view(space, genes).bits[:], view(space, genes).shared_bits[:] = counts.bits - 1, counts.shared_bits - 1
    return genes


def genes_of(space: SearchSpace, subnets: list[Subnet]) -> np.ndarray:
    """The subnets as a gene matrix (n, genes)."""
    rows = []
    for net in subnets:
        row = [space.kernel_sizes.index(k) for k in net.ks]
        row += [slot.mid_channels.index(net.mid_channels(slot)) for slot in space.slots]
        for kind, values in zip(space.operands, net.bits, strict=True):
            row += [kind.choices.index(b) for b in values]
        row += [stage.depths.index(d) for d, stage in zip(net.d, space.stages, strict=True)]
        row += [shared.choices.index(b) for b, shared in zip(net.shared_bits, space.shared_operands, strict=True)]
        rows.append([*row, space.resolutions.index(net.resolution)])
    return np.array(rows, dtype=np.int64).reshape(len(subnets), len(cardinalities(space)))


def check_genes(space: SearchSpace, genes: Any) -> None:
    """UserError unless these are a matrix `(n, genes)` of canonical rows, as searches keep it."""
    array("i", None, len(cardinalities(space)), low=0)(genes)
    if (genes >= cardinalities(space)).any() or (canonical(space, genes) != genes).any():
        raise UserError(f"its genes are not those of subnets of space {space.name}")


def subnets_of(space: SearchSpace, genes: np.ndarray) -> list[Subnet]:
    """The subnets of a gene matrix; inverse of `genes_of` for canonical rows."""
    parts = view(space, canonical(space, genes))
    return [
        Subnet(
            ks=tuple(space.kernel_sizes[g] for g in parts.ks[i]),
            e=tuple(slot.ratios[g] for slot, g in zip(space.slots, parts.e[i], strict=True)),
            d=tuple(stage.depths[g] for stage, g in zip(space.stages, parts.d[i], strict=True)),
            resolution=space.resolutions[parts.resolution[i]],
            bits=tuple(
                tuple(kind.choices[g] for g in row) for kind, row in zip(space.operands, parts.bits[i], strict=True)
            ),
            shared_bits=tuple(
                shared.choices[g] for shared, g in zip(space.shared_operands, parts.shared_bits[i], strict=True)
            ),
        )
        for i in range(len(genes))
    ]


def largest_subnet(space: SearchSpace) -> Subnet:
    """The deepest and widest subnet, with the largest kernels and resolution and the highest bits."""
    return subnets_of(space, cardinalities(space)[None] - 1)[0]


def smallest_subnet(space: SearchSpace) -> Subnet:
    """The shallowest and narrowest subnet, with the smallest kernels and resolution and the lowest bits.

    UserError where the rules of the space forbid it.
    """
    genes = np.zeros_like(cardinalities(space))[None]
    if forbidden_slots(space, genes).any():
        raise UserError(f"the rules of space {space.name} forbid its smallest kernel at its lowest bits")
    return subnets_of(space, genes)[0]
