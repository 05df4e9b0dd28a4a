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
CHUNK = 2048  # rows at a time: what is drawn and computed of them stays in cache


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
def gene_type(space: SearchSpace) -> np.dtype:
    """The smallest signed integer that holds all choices: int8 in most spaces. Less memory is less time."""
    return np.min_scalar_type(-int(cardinalities(space).max()))


@lru_cache(maxsize=64)
def _depth_table(space: SearchSpace) -> tuple[slice, np.ndarray, np.ndarray]:
    """The columns of depths; (cells,) all depths, stage after stage; (stages,) the first cell of each stage."""
    depths, end = [stage.depths for stage in space.stages], (2 + len(space.operands)) * len(space.slots)
    first = np.cumsum([0, *map(len, depths[:-1])])
    return slice(end, end + len(depths)), _frozen(np.concatenate(depths).astype(np.int16)), _frozen(first)


def active(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """(n, slots) bool: which slots run."""
    columns, depths, first = _depth_table(space)
    return space.runs(depths.take(genes[:, columns] + first))


def slot_genes(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """(n, parts, slots) view of what slots choose: kernels, mid channels, bits of every operand kind."""
    parts, slots = 2 + len(space.operands), len(space.slots)
    return genes[:, : parts * slots].reshape(len(genes), parts, slots)


def of_slots(space: SearchSpace, slots: np.ndarray) -> np.ndarray:
    """(n, columns of slots) for every column the value of its slot: (n, slots) -> (n, parts x slots)."""
    return np.concatenate([slots] * (2 + len(space.operands)), axis=1)


def chosen(take: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`one` where `take` is true, else `other`, as whole numbers of the type of `other`; like `numpy.where`.

    Bits are exchanged by masks. Branches on random masks take 20 times as long.
    """
    mask = -take.view(np.int8).astype(other.dtype, copy=False)  # all bits or none
    return mask & (one ^ other) ^ other


def canonical(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """A copy in which idle slots hold the defaults: (n, genes) -> same."""
    genes = genes.copy()
    _reset_idle(space, genes)
    return genes


def _reset_idle(space: SearchSpace, genes: np.ndarray) -> None:
    """Give the idle slots their defaults, in place."""
    runs = of_slots(space, active(space, genes))
    defaults = _defaults(space)[: runs.shape[1]].astype(genes.dtype)
    genes[:, : runs.shape[1]] = chosen(runs, genes[:, : runs.shape[1]], defaults)


@lru_cache(maxsize=64)
def _rules(space: SearchSpace) -> tuple[tuple[int, int, int], ...]:
    """(kernel gene, operand kind, bits gene) of every rule that concerns choices of the space."""
    names = [kind.name for kind in space.operands]
    rules = [(rule, names.index(rule.operand)) for rule in space.forbidden]
    return tuple(
        (space.kernel_sizes.index(rule.kernel_size), k, space.operands[k].choices.index(rule.bits))
        for rule, k in rules
        if rule.kernel_size in space.kernel_sizes and rule.bits in space.operands[k].choices
    )


def forbidden_slots(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """(n, slots) bool: which slots, running or idle, break a rule of the space."""
    parts = view(space, genes)
    return _broken(space, parts.ks, parts.bits)


def _broken(space: SearchSpace, ks: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Which blocks break a rule: kernels (n, blocks), bits (n, kinds, blocks) -> (n, blocks) bool."""
    broken = np.zeros(ks.shape, dtype=bool)
    for kernel, k, of_kind in _rules(space):
        broken |= (ks == kernel) & (bits[:, k] == of_kind)
    return broken


def legalise(space: SearchSpace, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A canonical copy in which the kernel and bits of forbidden slots are redrawn until they are legal.

    UserError after `MAX_REDRAWS` rounds.
    """
    return settled(space, genes.copy(), rng)


def settled(space: SearchSpace, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`legalise` without a copy: the matrix itself, changed in place."""
    _reset_idle(space, genes)
    if not _rules(space):
        return genes
    parts = view(space, genes)
    rows, slots = np.divmod(np.flatnonzero(_broken(space, parts.ks, parts.bits)), len(space.slots))
    ks, bits = np.empty((len(rows), 1), genes.dtype), np.empty((len(rows), len(space.operands), 1), genes.dtype)
    left = np.arange(len(rows))
    for _ in range(MAX_REDRAWS):
        if not len(left):
            parts.ks[rows, slots], parts.bits[rows, :, slots] = ks[:, 0], bits[:, :, 0]
            return genes
        ks[left, 0] = rng.integers(len(space.kernel_sizes), size=len(left))
        for k, kind in enumerate(space.operands):
            bits[left, k, 0] = rng.integers(len(kind.choices), size=len(left))
        left = left[_broken(space, ks[left], bits[left])[:, 0]]
    raise UserError(f"the rules of space {space.name} leave (almost) no legal block")


def sample(space: SearchSpace, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, genes) legal canonical rows of `gene_type`, with every choice drawn uniformly."""
    counts, genes = cardinalities(space), np.empty((n, len(cardinalities(space))), dtype=gene_type(space))
    for start in range(0, n, CHUNK):
        part = genes[start : start + CHUNK]
        part[:] = rng.integers(counts, size=part.shape)
    return settled(space, genes, rng)


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
