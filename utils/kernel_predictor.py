"""An accuracy predictor by kernel regression on the steps of genes, for few pairs.

It learns how much every choice matters, where an MLP starts with all alike, and says itself how uncertain it is. It
regresses log-odds of accuracies, which have no upper end for choices to saturate at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from apq.checkpoint import check_fit
from apq.errors import UserError
from apq.genes import cardinalities
from apq.space import SearchSpace
from utils.accuracy_predictor import AccuracyPredictor
from utils.converter import Converter
from utils.fast_predictor import one_thread_an_operation
from utils.gene_steps import steps_of
from utils.kernel_regression import Kernel, KernelConfig, KernelRegression, conditioned, fit

INITIAL, FEATURES = "initial.", "features"  # names in files
MOST_ROWS = 5000  # pairs that it predicts by; its memory is quadratic in them
CHUNK, NEAREST = 1024, 1e-4  # accuracies are kept this far from 0 and 1, whose log-odds are infinite


@dataclass(frozen=True, kw_only=True)
class KernelPredictor:
    """Predicts accuracies of gene matrices. `initial` is the full-precision predictor whose prediction is a feature.

    It has the calls of an `AccuracyPredictor` and of its fast form, and computes on the CPU.
    """

    space: SearchSpace
    quantize: bool
    regression: KernelRegression
    initial: AccuracyPredictor | None = None

    @property
    def converter(self) -> Converter:
        return Converter(self.space)

    @property
    def has_spread(self) -> bool:
        return True

    def fast(self, device: torch.device | str = "cpu") -> KernelPredictor:
        """Itself."""
        return self

    def __call__(self, genes: np.ndarray) -> np.ndarray:
        """(n,) float32 accuracies of a gene matrix."""
        return self.predict(genes)

    def state_dict(self) -> dict[str, Tensor]:
        """All numbers that it predicts by, for its file."""
        found, kernel = self.regression, self.regression.kernel
        own = {f"kernel.{name}": value for name, value in vars(kernel).items()}
        initial = {} if self.initial is None else self.initial.state_dict()
        return {
            **own,
            FEATURES: found.rows + found.centre,
            "targets": found.targets,
            **{f"{INITIAL}{name}": value for name, value in initial.items()},
        }

    def predict(self, genes: np.ndarray) -> np.ndarray:
        """(n,) float32 accuracies of a gene matrix."""
        found = np.empty(len(genes), dtype=np.float32)
        for start in range(0, len(genes), CHUNK):
            rows = slice(start, start + CHUNK)
            features, _ = _features(self.space, genes[rows], self.quantize, self.initial)
            found[rows] = 1 / (1 + np.exp(-self.regression.expected(features).numpy()))
        return found

    def mean_and_spread(self, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) float32 accuracies, and (n,) their posterior standard deviations (to first order)."""
        found = np.empty((2, len(genes)), dtype=np.float32)
        for start in range(0, len(genes), CHUNK):
            rows = slice(start, start + CHUNK)
            features, _ = _features(self.space, genes[rows], self.quantize, self.initial)
            logits, spread = (part.numpy() for part in self.regression.predict(features))
            top1 = 1 / (1 + np.exp(-logits))
            found[0, rows], found[1, rows] = top1, top1 * (1 - top1) * spread  # the slope of the logistic function
        return found[0], found[1]


def check_rows(n: int) -> None:
    """UserError for more pairs than a kernel can predict by."""
    if n > MOST_ROWS:
        raise UserError(f"{n} pairs are too many for a kernel, at most {MOST_ROWS}: train MLPs")


def train_kernel_predictor(
    genes: np.ndarray,
    accuracies: np.ndarray,
    space: SearchSpace,
    *,
    quantize: bool,
    initial: AccuracyPredictor | None = None,
    config: KernelConfig | None = None,
    seed: int = 0,
) -> KernelPredictor:
    """Fit a predictor to pairs, genes (n, genes) and accuracies (n,), of which none is held out.

    A full-precision predictor `initial` (APQ's transfer) gives one more feature: the log-odds that it predicts.
    """
    features, groups = _features(space, genes, quantize, initial)
    check_rows(len(genes))
    with one_thread_an_operation():
        regression = fit(features, groups, torch.from_numpy(_log_odds(accuracies)), config, seed)
    return KernelPredictor(space=space, quantize=quantize, regression=regression, initial=initial)


def kernel_from_weights(
    space: SearchSpace, weights: Mapping[str, Tensor], initial: AccuracyPredictor | None
) -> KernelPredictor:
    """The predictor of a `state_dict`, without the part of `initial`. UserError if the numbers do not fit together."""
    lowest = np.zeros((1, len(cardinalities(space))), dtype=np.int64)
    for quantize in (True, False):
        features, _ = _features(space, lowest, quantize, initial)
        if features.shape[1] == weights[FEATURES].shape[-1]:
            break
    shape = weights[FEATURES].shape
    n_rows, n_features = (shape[0] if len(shape) == 2 else 0), features.shape[1]
    if not 2 <= n_rows <= MOST_ROWS:
        raise UserError(f"it has {n_rows} rows, not 2 to {MOST_ROWS}")
    sizes = {"kernel.linear": (n_features,), "kernel.near": (n_features,), "kernel.amplitude": (), "kernel.noise": ()}
    sizes |= {FEATURES: (n_rows, n_features), "targets": (n_rows,)}
    check_fit(weights, {name: torch.empty(size, device="meta") for name, size in sizes.items()})
    numbers = {name: value.double() for name, value in weights.items()}
    parts = {field.name: numbers[f"kernel.{field.name}"] for field in fields(Kernel)}
    if any((part <= 0).any() for part in parts.values()):
        raise UserError("its kernel has weights that are not positive")
    try:
        regression = conditioned(Kernel(**parts), numbers[FEATURES], numbers["targets"])
    except torch.linalg.LinAlgError as error:
        raise UserError("its rows do not fit its kernel") from error
    return KernelPredictor(space=space, quantize=quantize, regression=regression, initial=initial)


def _features(
    space: SearchSpace, genes: np.ndarray, quantize: bool, initial: AccuracyPredictor | None
) -> tuple[Tensor, Tensor]:
    """(n, k) float64 features, and (k,) the group of each."""
    steps, groups = steps_of(space, genes, policy=quantize)
    if initial is not None:
        steps = np.column_stack([steps, _log_odds(initial.predict(genes))])
        groups = np.append(groups, groups.max() + 1)
    return torch.from_numpy(steps), torch.from_numpy(groups)


def _log_odds(accuracies: np.ndarray) -> np.ndarray:
    inside = np.clip(np.asarray(accuracies, dtype=np.float64), NEAREST, 1 - NEAREST)
    return np.log(inside / (1 - inside))
