"""The fast form of accuracy predictors, for searches: a gather of rows, then matrix products."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apq.genes import cardinalities
from apq.space import SearchSpace
from lut.gene_tables import GeneTables, gene_column

if TYPE_CHECKING:
    from utils.accuracy_predictor import AccuracyPredictor

CHUNK = 1024  # most candidates at a time: their activations (1.6 MB a layer) stay in cache
FEWEST = 256  # candidates at a time where there are as many: fewer would not pay for reading the weights
GPU_CHUNK = 1 << 15  # candidates at a time on a GPU: 52 MB a layer
MOST_ROWS_A_TABLE = 256


class FastPredictor:
    """An `AccuracyPredictor` whose first layer is a gather of rows: genes `(n, genes)` -> float32 `(n,)`.

    A one-hot vector times a matrix is a sum of rows. The rows of a slot's kernel and mid channels are summed in
    advance, and so are those of its bits. A candidate then sums two rows a slot, not six. The rows of several members
    stand side by side, so that one gather serves all; the layers after it are batched products. It computes on
    `device`, on a CPU on as many threads as torch has.
    """

    def __init__(self, predictor: AccuracyPredictor, device: torch.device) -> None:
        space, converter, self.members = predictor.space, predictor.converter, predictor.members
        width = predictor.members * predictor.hidden  # of all members together
        weights = {name: value.to(device, copy=True) for name, value in stacked(predictor).items()}

        def side_by_side(layer: str) -> tuple[Tensor, Tensor]:  # (n_in, width), (width,)
            return weights[f"{layer}.weight"].permute(2, 0, 1).flatten(1), weights[f"{layer}.bias"].flatten()

        first, first_bias = side_by_side("layers.0.0")  # (half_dim, width), (width,)
        biases = [first_bias]
        if predictor.quantize:
            of_bits, bias = side_by_side("quantize_fc")
            first = torch.cat([first, of_bits])  # (full_dim, width)
            biases.append(bias + first[converter.always].sum(0))
        sections = {int(column): i for i, column in enumerate(converter.columns)}

        def rows_of_column(column: int) -> Tensor:  # (choices, width) weights of one one-hot
            section = sections[column]
            start = converter.offsets[section]
            return first[start : start + converter.choices[section]]

        def rows_of(what: str | int, slot: int) -> Tensor:
            return rows_of_column(gene_column(space, what, slot))

        groups = [("ks", "e"), *(_kind_groups(space) if predictor.quantize else [])]
        self._tables = GeneTables(space, groups)
        self._rows = torch.zeros(self._tables.size + 1, width, device=device)  # the last row is for idle slots
        for group, slot, shape, place in self._tables:
            rows = self._rows[place].view(*shape, -1)
            for axis, what in enumerate(groups[group]):
                rows += rows_of(what, slot).view([-1 if a == axis else 1 for a in range(len(shape))] + [first.shape[1]])
            if slot == 0 and group < 2:  # the first slot always runs, so it can carry the bias
                rows += biases[group]
        self._shared_rows = [  # (gene column, its rows) of the bits of shared operands
            (column, rows_of_column(column)) for column in _shared_columns(space) if predictor.quantize
        ]
        self._depth_rows = [  # (gene column, its rows) of depths, where they have features of their own
            (column, first[start : start + width].cumsum(0)[torch.tensor(stage.depths) - 1])
            for (column, start, width), stage in zip(converter.depths, space.stages, strict=False)
        ]
        self._plain = predictor.plain and predictor.quantize
        has_resolution = len(cardinalities(space)) - 1 in sections  # of several resolutions, and in QFA's layout
        self._resolution_rows = rows_of("resolution", 0) if has_resolution else None
        self._hidden = [  # (members, hidden, hidden), (members, 1, hidden)
            (weights[f"layers.{i}.0.weight"].transpose(1, 2).contiguous(), weights[f"layers.{i}.0.bias"][:, None])
            for i in range(1, predictor.n_layers)
        ]
        # (members, hidden, 1), (members, 1, 1)
        self._regressor = weights["regressor.weight"].transpose(1, 2), weights["regressor.bias"][:, None]

    @property
    def has_spread(self) -> bool:
        """Whether there are several members, which may disagree."""
        return self.members > 1

    def __call__(self, genes: np.ndarray) -> np.ndarray:
        """(n,) float32 accuracies of a gene matrix: means over the members."""
        return self._of_members(genes).mean(0).numpy() if self.members > 1 else self._of_members(genes)[0].numpy()

    def mean_and_spread(self, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) float32 means over the members, and (n,) their standard deviations, unbiased; 0 where there is one."""
        accuracies = self._of_members(genes)
        if self.members == 1 or not len(genes):
            return accuracies[0].numpy(), np.zeros(len(genes), dtype=np.float32)
        std, mean = torch.std_mean(accuracies, dim=0)
        return mean.numpy(), std.numpy()

    def _of_members(self, genes: np.ndarray) -> Tensor:
        """(members, n) accuracies by each member, on the CPU."""
        out = torch.empty(self.members, len(genes), device=self._rows.device)
        if out.is_cuda:
            self._predict_chunks(genes, iter(range(0, len(genes), GPU_CHUNK)), GPU_CHUNK, out)
            return out.cpu()
        # Two chunks if possible. They do not depend on the number of threads, so that the last digits do not.
        size = min(max(-(-len(genes) // 2), FEWEST), CHUNK)
        starts = range(0, len(genes), size)
        with one_thread_an_operation() as n_threads:
            left, pool = iter(starts), _threads(n_threads)  # whoever is ready takes the next chunk
            others = [pool.submit(self._predict_chunks, genes, left, size, out) for _ in starts[1:n_threads]]
            self._predict_chunks(genes, left, size, out)
            for other in others:
                other.result()
        return out

    def _predict_chunks(self, genes: np.ndarray, starts: Iterator[int], size: int, out: Tensor) -> None:
        with torch.inference_mode():
            # Two buffers hold all products: new memory for each would take as long as a layer.
            buffers = torch.empty(2, min(size, len(genes)) * self._rows.shape[1], device=out.device)
            for start in starts:
                chunk = genes[start : start + size]
                self._predict(chunk, buffers, out[:, start : start + size])

    def _predict(self, genes: np.ndarray, buffers: Tensor, out: Tensor) -> None:
        architecture, *policy = torch.from_numpy(self._tables.index(genes)).to(out.device)  # each (n, slots)
        x = F.embedding_bag(architecture, self._rows, mode="sum")  # (n, hidden)
        if self._resolution_rows is not None:
            x += self._resolution_rows[_index(genes[:, -1])]
        for column, rows in self._depth_rows:
            x += rows[_index(genes[:, column])]
        if not self._plain:
            x.relu_()
        for group in policy:
            x += F.embedding_bag(group, self._rows, mode="sum")
        for column, rows in self._shared_rows:
            x += rows[_index(genes[:, column])]
        if self._plain:
            x.relu_()
        n, width = x.shape
        shape = (self.members, n, width // self.members)
        x = x.view(n, self.members, -1).transpose(0, 1)  # (members, n, hidden)
        for (weight, bias), buffer in zip(self._hidden, itertools.cycle(buffers), strict=False):
            x = torch.baddbmm(bias, x, weight, out=buffer[: n * width].view(shape)).relu_()
        weight, bias = self._regressor
        torch.add(torch.bmm(x, weight), bias, out=out.unsqueeze(-1))


def _index(genes: np.ndarray) -> Tensor:
    """A column of genes, which may be small integers, as an index for torch."""
    return torch.from_numpy(genes.astype(np.int64))


@functools.lru_cache(maxsize=1)
def _threads(n: int) -> ThreadPoolExecutor:
    """Up to `n` threads. They stay, because starting them takes as long as scoring 40 candidates."""
    return ThreadPoolExecutor(n)


os.register_at_fork(after_in_child=_threads.cache_clear)  # a process that is forked has none of the threads


@contextlib.contextmanager
def one_thread_an_operation() -> Iterator[int]:
    """Context in which torch runs each operation on one thread. Yields the number of threads before.

    These layers are too small for several threads, whose synchronisation takes longer than the work. If other programs
    keep a core busy it takes ten times as long.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_threads)


def stacked(predictor: AccuracyPredictor) -> dict[str, Tensor]:
    """The weights in float32 with an axis of members in front, which one MLP does not have in its state dict."""
    weights = {name: value.detach().float() for name, value in predictor.state_dict().items()}
    return weights if predictor.members > 1 else {name: value[None] for name, value in weights.items()}


def _shared_columns(space: SearchSpace) -> range:
    """Gene columns of the shared operands, which are before the resolution."""
    last = len(cardinalities(space)) - 1
    return range(last - len(space.shared_operands), last)


def _kind_groups(space: SearchSpace) -> list[tuple[int, ...]]:
    """Groups of operand kinds, each with few enough combinations of bits for one table a slot."""
    groups: list[tuple[int, ...]] = [()]
    n_rows = 1
    for k, kind in enumerate(space.operands):
        if n_rows * len(kind.choices) > MOST_ROWS_A_TABLE and groups[-1]:
            groups.append(())
            n_rows = 1
        groups[-1] += (k,)
        n_rows *= len(kind.choices)
    return groups
