"""Subnets as one-hot vectors, the form that accuracy predictors read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.files import Record
from apq.genes import active, canonical, cardinalities, genes_of, sample, subnets_of, view, with_highest_bits
from apq.presets import APQ_IMAGENET
from apq.space import SearchSpace
from apq.subnet import Subnet, architecture_of, policy_of, subnet_from_spec
from utils.encoding_layout import layout_of


class Converter:
    """One-hot encoding of the subnets of a space, with the published layout of APQ (CVPR 2020) or QFA (NeurIPS 2021).

    The architecture half (`half_dim` entries) has kernels, mid channels and the resolution, the policy half has bits;
    see `encoding_layout`. Idle slots are all zeros. `apq-imagenet` has 520 + 252 = 772 entries, `qfa-mbv3` has 165 +
    390 = 555. `seed` is for `random_spec` alone.
    """

    def __init__(self, space: SearchSpace = APQ_IMAGENET, seed: int | None = None) -> None:
        self.space = space
        self._rng = np.random.default_rng(seed)
        architecture, policy = layout_of(space)
        sections = [*architecture, *policy]
        starts = np.cumsum([0, *(section.width for section in sections)])
        self.half_dim, self.full_dim = int(starts[len(architecture)]), int(starts[-1])
        placed = list(zip(sections, starts[:-1].tolist(), strict=True))
        one_hot = [(section, start) for section, start in placed if section.kind == "choice"]
        self.columns = np.array([section.column for section, _ in one_hot])  # (sections,) gene column of every one-hot
        self.choices = np.array([section.width for section, _ in one_hot])  # (sections,)
        self.offsets = np.array([start for _, start in one_hot])  # (sections,) first entry of each
        per_slot, slots = (2 + len(space.operands)) * len(space.slots), len(space.slots)
        self.slot_of_section = np.where(self.columns < per_slot, self.columns % slots, -1)  # -1: not in a slot
        # (gene column, first entry, entries) of depths that have entries of their own; entries that are always 1
        self.depths = [(section.column, start, section.width) for section, start in placed if section.kind == "depth"]
        self.always = [start + section.width - 1 for section, start in placed if section.kind == "unused"]

    def _one_hots(self, genes: np.ndarray) -> np.ndarray:
        """(n, sections) int64 indices of the ones of all one-hots; `full_dim` for those of idle slots."""
        runs = np.ones((len(genes), len(self.space.slots) + 1), dtype=bool)  # the last column serves section slot -1
        runs[:, :-1] = active(self.space, genes)
        return np.where(runs[:, self.slot_of_section], genes[:, self.columns] + self.offsets, self.full_dim)

    def encode(self, genes: np.ndarray) -> np.ndarray:
        """(n, full_dim) float32 one-hot rows of a gene matrix."""
        features = np.zeros((len(genes), self.full_dim + 1), dtype=np.float32)  # the last column takes the padding
        np.put_along_axis(features, self._one_hots(genes), 1.0, axis=1)
        for (column, start, width), stage in zip(self.depths, self.space.stages, strict=False):
            features[:, start : start + width] = np.arange(width) < np.array(stage.depths)[genes[:, column], None]
        features[:, self.always] = 1
        return features[:, :-1]

    def decode(self, features: np.ndarray) -> np.ndarray:
        """(n, genes) canonical rows. Inverse of `encode`. UserError for rows that encode no subnet."""
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.full_dim:
            raise UserError(
                f"features of space {self.space.name} have shape (n, {self.full_dim}), not {features.shape}"
            )
        genes = np.zeros((len(features), len(cardinalities(self.space))), dtype=np.int64)
        for column, start, n_choices in zip(self.columns, self.offsets, self.choices, strict=True):
            genes[:, column] = features[:, start : start + n_choices].argmax(axis=1)
        kernel_dim = len(self.space.kernel_sizes) * len(self.space.slots)
        runs = features[:, :kernel_dim].reshape(len(features), len(self.space.slots), -1).any(axis=2)  # (n, slots)
        for i, stage in enumerate(self.space.stages):
            depth = runs[:, self.space.stage_of_slot == i].sum(axis=1)
            view(self.space, genes).d[:, i] = np.searchsorted(stage.depths, depth).clip(max=len(stage.depths) - 1)
        genes = canonical(self.space, genes)
        if len(wrong := np.flatnonzero((self.encode(genes) != features).any(axis=1))):
            raise UserError(f"row {wrong[0]} of the features is not the encoding of a subnet of {self.space.name}")
        return genes

    def genes_of_specs(self, specs: list[Mapping[str, Any] | Subnet]) -> np.ndarray:
        """(n, genes) of published specs or subnets. UserError says what is wrong with a spec."""
        return genes_of(self.space, [s if isinstance(s, Subnet) else subnet_from_spec(self.space, s) for s in specs])

    def spec2feature(self, spec: Mapping[str, Any] | Subnet, quantize: bool = True) -> np.ndarray:
        """(full_dim,) float32 vector of one spec. Expansions between two choices are rounded to the nearest one.

        `quantize=False` reproduces a quirk of the published code, which the published accuracies of searched networks
        depend on: all bits are encoded as the highest (8), so that the predictor ignores the policy.
        """
        genes = self.genes_of_specs([spec])
        return self.encode(genes if quantize else with_highest_bits(self.space, genes))[0]

    def feature2spec(self, vector: np.ndarray) -> Record:
        """The published spec of a `(full_dim,)` vector. Idle slots have the smallest choices and 8 bits."""
        return self._spec(self.decode(np.asarray(vector)[None]))

    def random_spec(self, rng: np.random.Generator | None = None) -> Record:
        """A legal spec, every choice drawn uniformly by `rng`, or else by a generator with the constructor's seed."""
        return self._spec(sample(self.space, 1, self._rng if rng is None else rng))

    def is_valid(self, spec: Mapping[str, Any]) -> bool:
        """Whether all slots of a published spec, running and idle, have legal values in legal combinations."""
        if not isinstance(spec, Mapping):
            return False
        try:
            subnet_from_spec(self.space, spec)
            subnet_from_spec(self.space, {**spec, "d": [stage.depths[-1] for stage in self.space.stages]})
        except UserError:
            return False
        return True

    def _spec(self, genes: np.ndarray) -> Record:
        (subnet,) = subnets_of(self.space, genes)
        return {**architecture_of(self.space, subnet), **policy_of(self.space, subnet)}
