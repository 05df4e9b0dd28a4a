"""Coarse-to-fine search (OQA, arXiv 2010.04354): measure many subnets, keep the front, vary its kernels.

Coarse stage: random subnets are measured as they are, equally many in each of several equal intervals of MACs. Fine
stage: the skeletons of the front (resolution, depths, mid channels) are measured with other kernel sizes. The result is
the front of both stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from apq.errors import UserError
from apq.fronts import interval_of, pareto_front
from apq.genes import active, canonical, cardinalities, legalise, view, with_highest_bits
from apq.space import SearchSpace

MOST_ROUNDS = 60  # rounds of proposals; after them intervals may have too few subnets
FEWEST_PROPOSALS = 1024  # proposals a round
STAGES = ("coarse", "fine")

GeneFunction = Callable[[np.ndarray], np.ndarray]  # (n, genes) -> (n,)
Evaluate = Callable[[str, np.ndarray], np.ndarray]  # stage, (n, genes) -> (n,) top-1


@dataclass(frozen=True, kw_only=True)
class CoarseToFineConfig:
    """Settings of a search. UserError where one is out of range.

    `n_coarse` subnets are spread over `intervals` from `flops_min` to `flops_max` MACs; the paper has 10,000 over 50 to
    300 M. Each skeleton gets `n_fine` variants, in which each kernel changes with probability `kernel_prob`.
    """

    flops_min: float
    flops_max: float
    n_coarse: int = 200
    intervals: int = 5
    n_fine: int = 8
    kernel_prob: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.flops_min < self.flops_max < math.inf):
            raise UserError(f"--flops_min {self.flops_min:g} must be below --flops_max {self.flops_max:g}")
        if not 1 <= self.intervals <= self.n_coarse:
            raise UserError(f"{self.n_coarse} coarse subnets cannot be spread over {self.intervals} intervals")
        if self.n_fine < 0 or not 0 < self.kernel_prob <= 1:
            raise UserError(f"--n_fine {self.n_fine} must be at least 0, --kernel_prob {self.kernel_prob} in (0, 1]")

    @property
    def edges(self) -> np.ndarray:
        """(intervals + 1,) MACs at the edges of the intervals."""
        return np.linspace(self.flops_min, self.flops_max, self.intervals + 1)


@dataclass(frozen=True)
class Measured:
    """Measured subnets of both stages, the coarse ones first. FLOPs are MACs."""

    genes: np.ndarray  # (n, genes)
    flops: np.ndarray  # (n,)
    top1: np.ndarray  # (n,)
    n_coarse: int

    def front(self) -> np.ndarray:
        """(front,) indices of the subnets on the front, by ascending MACs."""
        return pareto_front(self.flops, self.top1)

    def coarse_front(self) -> np.ndarray:
        """The front of the coarse stage alone."""
        return pareto_front(self.flops[: self.n_coarse], self.top1[: self.n_coarse])

    def stage_of(self, i: int) -> tuple[str, int]:
        """The stage of row `i`, and the row's index in that stage."""
        return ("coarse", i) if i < self.n_coarse else ("fine", i - self.n_coarse)


def coarse_to_fine(space: SearchSpace, config: CoarseToFineConfig, flops: GeneFunction, evaluate: Evaluate) -> Measured:
    """Run both stages. `evaluate` gets all subnets of a stage in one call.

    Equal settings and accuracies give equal subnets. UserError where no subnet lies in the range of MACs.
    """
    coarse = spread(space, config.n_coarse, config.edges, flops, np.random.default_rng([config.seed, 0]))
    if not len(coarse):
        raise UserError(
            f"no subnet of space {space.name} was found from {config.edges[0]:g} to {config.edges[-1]:g} MACs"
        )
    found = Measured(coarse, flops(coarse), evaluate("coarse", coarse), len(coarse))
    fine = perturbed(space, coarse, skeletons(space, found), config, flops)
    if not len(fine):
        return found
    return Measured(
        np.concatenate([coarse, fine]),
        np.concatenate([found.flops, flops(fine)]),
        np.concatenate([found.top1, evaluate("fine", fine)]),
        len(coarse),
    )


def quotas(n: int, intervals: int) -> np.ndarray:
    """(intervals,) numbers of subnets that sum to `n`, as equal as possible, with the remainder in the first ones."""
    return n // intervals + (np.arange(intervals) < n % intervals)


def spread(space: SearchSpace, n: int, edges: np.ndarray, flops: GeneFunction, rng: np.random.Generator) -> np.ndarray:
    """(up to n, genes) distinct random subnets, equally many in each interval between `edges`, by interval.

    After `MOST_ROUNDS` rounds of proposals intervals may have fewer: a small space may not have as many.
    """
    left = quotas(n, len(edges) - 1)
    kept, at_kept = np.zeros((0, len(cardinalities(space))), dtype=np.int64), np.zeros(0, dtype=np.int64)
    for number in range(MOST_ROUNDS):
        proposed = _new(kept, propose(space, max(FEWEST_PROPOSALS, 2 * n), number, rng))
        at = interval_of(flops(proposed), edges)
        chosen = (at >= 0) & (_place_in_group(at) < left[at])
        kept, at_kept = np.concatenate([kept, proposed[chosen]]), np.concatenate([at_kept, at[chosen]])
        left = left - np.bincount(at[chosen], minlength=len(left))
        if not left.any():
            break
    return kept[np.argsort(at_kept, kind="stable")]


def propose(space: SearchSpace, n: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """(n, genes) random legal rows at the highest bits, of all sizes, for round `number` of `spread`.

    Uniform choices rarely give a subnet near either end of the range of MACs. So the kernels, mid channels, depths and
    resolution of a row each have a level t, uniform in 0 to 1, and a choice is the fraction u^((1 - t) / t) of the
    range, u uniform. Its mean is t: the smallest choice at 0, uniform at 1/2, the largest at 1. In the first round the
    four levels of a row are independent, so that shallow and wide subnets are as frequent as deep and narrow ones. In
    later rounds they are correlated, which reaches the ends.
    """
    counts = cardinalities(space)
    together, apart = rng.random((n, 1)), rng.random((n, 4))
    levels = together + (apart - together) / (1 + number)  # (n, 4): kernels, widths, depths, resolution
    group = np.zeros((1, len(counts)), dtype=np.int64)  # bits are set below
    parts = view(space, group)
    for i, part in enumerate((parts.ks, parts.e, parts.d, parts.resolution)):
        part[:] = i
    level = np.clip(levels[:, group[0]], 1e-6, 1)  # (n, genes)
    draw = rng.random(level.shape) ** ((1 - level) / level)
    genes = np.minimum((draw * counts).astype(np.int64), counts - 1)
    return legalise(space, with_highest_bits(space, genes), rng)


def skeletons(space: SearchSpace, found: Measured) -> np.ndarray:
    """Indices of rows of the coarse front, one for each skeleton: the most accurate row that has it."""
    front = found.coarse_front()[::-1]  # the most accurate first
    bare = canonical(space, found.genes[front])
    view(space, bare).ks[:] = 0
    _, first = np.unique(bare, axis=0, return_index=True)
    return front[np.sort(first)][::-1]


def perturbed(
    space: SearchSpace, coarse: np.ndarray, bases: np.ndarray, config: CoarseToFineConfig, flops: GeneFunction
) -> np.ndarray:
    """(up to bases x n_fine, genes) distinct rows with other kernels, skeleton by skeleton, none of them in `coarse`.

    They are within the range of MACs. A skeleton with few kernels may have fewer variants.
    """
    rng = np.random.default_rng([config.seed, 1])
    left = np.full(len(bases), config.n_fine)
    kept, base_of_kept = coarse[:0], np.zeros(0, dtype=np.int64)
    for _ in range(MOST_ROUNDS):
        base = np.repeat(np.arange(len(bases)), 2 * left)
        if not len(base):
            break
        genes = change_kernels(space, coarse[bases[base]], config.kernel_prob, rng)
        genes, new = _new(np.concatenate([coarse, kept]), genes, return_index=True)
        base, cost = base[new], flops(genes)
        chosen = (cost >= config.flops_min) & (cost <= config.flops_max)
        genes, base = genes[chosen], base[chosen]
        chosen = _place_in_group(base) < left[base]
        kept, base_of_kept = np.concatenate([kept, genes[chosen]]), np.concatenate([base_of_kept, base[chosen]])
        left = left - np.bincount(base[chosen], minlength=len(left))
    return kept[np.argsort(base_of_kept, kind="stable")]


def change_kernels(space: SearchSpace, genes: np.ndarray, prob: float, rng: np.random.Generator) -> np.ndarray:
    """A legal copy in which each kernel that runs becomes one of the other sizes with probability `prob`."""
    genes, sizes = genes.copy(), len(space.kernel_sizes)
    ks = view(space, genes).ks
    if sizes > 1:
        hit = (rng.random(ks.shape) < prob) & active(space, genes)
        ks[:] = np.where(hit, (ks + rng.integers(1, sizes, size=ks.shape)) % sizes, ks)
    return legalise(space, genes, rng)


def _new(known: np.ndarray, genes: np.ndarray, *, return_index: bool = False):  # noqa: ANN202 - as numpy.unique
    """The distinct rows of `genes` that are not in `known`, in order; with `return_index` also their indices."""
    _, first = np.unique(np.concatenate([known, genes]), axis=0, return_index=True)
    index = np.sort(first[first >= len(known)]) - len(known)
    return (genes[index], index) if return_index else genes[index]


def _place_in_group(group: np.ndarray) -> np.ndarray:
    """(n,) number of earlier items in the group of each item."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    place = np.empty(len(group), dtype=np.int64)
    place[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return place
