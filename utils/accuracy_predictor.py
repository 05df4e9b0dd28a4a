"""The accuracy predictor: an MLP from one-hot subnets to top-1, and its fast form for searches.

APQ (Wang et al., CVPR 2020, arXiv 2006.08509), section 3.2: a predictor trained on many full-precision subnets is
transferred to quantized ones, which are expensive to measure, by adding an input for the bits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq.genes import cardinalities
from apq.presets import APQ_IMAGENET
from apq.space import SearchSpace
from apq.subnet import Subnet
from lut.gene_tables import GeneTables, gene_column
from utils.converter import Converter
from utils.encoding_layout import chooses_as_qfa

CHUNK = 1024  # most candidates at a time: their activations (1.6 MB a layer) stay in cache
FEWEST = 256  # candidates at a time where there are as many: fewer would not pay for reading the weights
GPU_CHUNK = 1 << 15  # candidates at a time on a GPU: 52 MB a layer
MOST_ROWS_A_TABLE = 256


class AccuracyPredictor(nn.Module):
    """MLP with the first layer relu(W x_arch + b) + Q x_policy + q, then `n_layers - 1` ReLU layers and a regressor.

    In spaces with QFA's choices it is a plain MLP, with the first layer relu(W x_arch + b + Q x_policy + q).

    `quantize=False` builds the full-precision predictor, without Q, which reads the architecture half alone. State dict
    keys are the published ones: `layers.<i>.0.*`, `quantize_fc.*`, `regressor.*`.
    """

    def __init__(
        self, space: SearchSpace = APQ_IMAGENET, hidden: int = 400, n_layers: int = 3, quantize: bool = True
    ) -> None:
        super().__init__()
        self.space, self.hidden, self.n_layers, self.quantize = space, hidden, n_layers, quantize
        self.converter, self.plain = Converter(space), chooses_as_qfa(space)
        widths = [self.converter.half_dim, *[hidden] * n_layers]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU()) for n_in, n_out in itertools.pairwise(widths)
        )
        if quantize:
            self.quantize_fc = nn.Linear(self.converter.full_dim - self.converter.half_dim, hidden)
        self.regressor = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:  # (n, full_dim) -> (n,); full precision: (n, >= half_dim)
        half = self.converter.half_dim
        first, relu = self.layers[0]
        x = first(features[:, :half])  # (n, hidden)
        if not self.quantize:
            x = relu(x)
        elif self.plain:
            x = relu(x + self.quantize_fc(features[:, half:]))
        else:
            x = relu(x) + self.quantize_fc(features[:, half:])
        for layer in self.layers[1:]:
            x = layer(x)
        return self.regressor(x).squeeze(1)

    def predict_accuracy(self, specs: Sequence[Mapping[str, Any] | Subnet]) -> np.ndarray:
        """(specs,) float32 accuracies of published specs or subnets, with their policies."""
        return self.predict(self.converter.genes_of_specs(list(specs)))

    def predict(self, genes: np.ndarray) -> np.ndarray:
        """(n,) float32 accuracies of a gene matrix. Each call folds the weights: for many calls, call `fast()` once."""
        return self.fast()(genes)

    def fast(self, device: torch.device | str = "cpu") -> FastPredictor:
        """The predictor with its present weights folded for speed. It does not follow later changes of the weights."""
        return FastPredictor(self, torch.device(device))


class FastPredictor:
    """An `AccuracyPredictor` whose first layer is a gather of rows: genes `(n, genes)` -> float32 `(n,)`.

    A one-hot vector times a matrix is a sum of rows. The rows of a slot's kernel and mid channels are summed in
    advance, and so are those of its bits. A candidate then sums two rows a slot, not six. It computes on `device`, on
    a CPU on as many threads as torch has.
    """

    def __init__(self, predictor: AccuracyPredictor, device: torch.device) -> None:
        space, converter = predictor.space, predictor.converter
        weights = {name: value.detach().float().to(device, copy=True) for name, value in predictor.state_dict().items()}
        first, first_bias = weights["layers.0.0.weight"].T, weights["layers.0.0.bias"]  # (half_dim, hidden), (hidden,)
        if predictor.quantize:
            first = torch.cat([first, weights["quantize_fc.weight"].T])  # (full_dim, hidden)
        biases = [first_bias, weights.get("quantize_fc.bias")]
        if predictor.quantize:
            biases[1] = biases[1] + first[converter.always].sum(0)
        sections = {int(column): i for i, column in enumerate(converter.columns)}

        def rows_of_column(column: int) -> Tensor:  # (choices, hidden) weights of one one-hot
            section = sections[column]
            start = converter.offsets[section]
            return first[start : start + converter.choices[section]]

        def rows_of(what: str | int, slot: int) -> Tensor:
            return rows_of_column(gene_column(space, what, slot))

        groups = [("ks", "e"), *(_kind_groups(space) if predictor.quantize else [])]
        self._tables = GeneTables(space, groups)
        self._rows = torch.zeros(
            self._tables.size + 1, predictor.hidden, device=device
        )  # the last row is for idle slots
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
        self._hidden = [
            (weights[f"layers.{i}.0.weight"].T.contiguous(), weights[f"layers.{i}.0.bias"])
            for i in range(1, predictor.n_layers)
        ]
        self._regressor = weights["regressor.weight"][0], weights["regressor.bias"]

    def __call__(self, genes: np.ndarray) -> np.ndarray:
        """(n,) float32 accuracies of a gene matrix."""
        out = torch.empty(len(genes), device=self._rows.device)
        if out.is_cuda:
            self._predict_chunks(genes, iter(range(0, len(genes), GPU_CHUNK)), GPU_CHUNK, out)
            return out.cpu().numpy()
        # Two chunks if possible. They do not depend on the number of threads, so that the last digits do not.
        size = min(max(-(-len(genes) // 2), FEWEST), CHUNK)
        starts = range(0, len(genes), size)
        with one_thread_an_operation() as n_threads:
            left, pool = iter(starts), _threads(n_threads)  # whoever is ready takes the next chunk
            others = [pool.submit(self._predict_chunks, genes, left, size, out) for _ in starts[1:n_threads]]
            self._predict_chunks(genes, left, size, out)
            for other in others:
                other.result()
        return out.numpy()

    def _predict_chunks(self, genes: np.ndarray, starts: Iterator[int], size: int, out: Tensor) -> None:
        with torch.inference_mode():
            # Two buffers hold all products: new memory for each would take as long as a layer.
            buffers = torch.empty(2, min(size, len(genes)), self._rows.shape[1], device=out.device)
            for start in starts:
                chunk = genes[start : start + size]
                self._predict(chunk, buffers[:, : len(chunk)], out[start : start + size])

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
        for (weight, bias), buffer in zip(self._hidden, itertools.cycle(buffers), strict=False):
            x = torch.addmm(bias, x, weight, out=buffer).relu_()
        weight, bias = self._regressor
        torch.mv(x, weight, out=out).add_(bias)


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


def transfer(predictor: AccuracyPredictor) -> AccuracyPredictor:
    """A quantized predictor that starts from a full-precision one: weights are copied, the layer of the bits is zero.

    At first it predicts the full-precision accuracy for every policy. The zero layer can learn, because its gradient
    passes through the trained layers after it.
    """
    weights = predictor.state_dict()
    quantized = AccuracyPredictor(predictor.space, predictor.hidden, predictor.n_layers, quantize=True)
    nn.init.zeros_(quantized.quantize_fc.weight)
    nn.init.zeros_(quantized.quantize_fc.bias)
    quantized.load_state_dict({**quantized.state_dict(), **{k: v.cpu() for k, v in weights.items()}})
    return quantized


@torch.no_grad()
def scale_output(predictor: AccuracyPredictor, factor: float, shift: float) -> None:
    """Make a predictor output `factor * accuracy + shift`, by changing its regressor in place."""
    predictor.regressor.weight.mul_(factor)
    predictor.regressor.bias.mul_(factor).add_(shift)


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
