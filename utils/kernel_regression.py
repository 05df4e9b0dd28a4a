"""Gaussian-process regression whose kernel learns how much each choice matters, for hundreds to thousands of pairs.

The kernel is a linear one plus a squared-exponential one, both with a weight for each group of features (automatic
relevance determination, Rasmussen and Williams 2006, chapter 5). Weights, amplitude and noise maximise the marginal
likelihood, with a normal prior on the logarithm of each weight relative to their common size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_nn.training.progress import Progress

LEAST_NOISE = 1e-6  # added to the noise: keeps the Cholesky decomposition of equal rows possible


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Settings of a fit: steps of Adam, its learning rate, the standard deviation of the prior, and the most rows that
    the likelihood is computed of (its time is cubic in them); predictions use all rows."""

    steps: int = 150
    lr: float = 0.05
    prior: float = 1.0
    most_rows: int = 600


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """k(a, b) = sum_k linear_k a_k b_k + amplitude exp(-sum_k near_k (a_k - b_k)^2), and the variance of the noise."""

    linear: Tensor  # (k,)
    near: Tensor  # (k,)
    amplitude: Tensor  # ()
    noise: Tensor  # ()

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:  # (n, k), (m, k) -> (n, m)
        root = self.near.sqrt()
        x, y = a * root, b * root
        squared = ((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T).clamp_min(0)
        return (a * self.linear) @ b.T + self.amplitude * torch.exp(-squared)

    def variance(self, a: Tensor) -> Tensor:  # (n, k) -> (n,): the diagonal of k(a, a)
        return (a * a * self.linear).sum(1) + self.amplitude


@dataclass(frozen=True, kw_only=True)
class KernelRegression:
    """A kernel and the rows that it was fitted to. Predicts targets and how uncertain they are."""

    kernel: Kernel
    rows: Tensor  # (m, k), less `centre`
    centre: Tensor  # (k,)
    factor: Tensor  # (m, m) lower Cholesky factor of k(rows, rows) + noise
    targets: Tensor  # (m,)
    weights: Tensor  # (m,): (k(rows, rows) + noise)^-1 standardised targets
    mean: float
    std: float

    def expected(self, features: Tensor) -> Tensor:
        """(n,) posterior means of features (n, k), as `predict` has them, in half of its time."""
        return self.kernel(features - self.centre, self.rows) @ self.weights * self.std + self.mean

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) posterior means and (n,) standard deviations, without the noise, of features (n, k)."""
        x = features - self.centre
        shared = self.kernel(x, self.rows)  # (n, m)
        known = torch.linalg.solve_triangular(self.factor, shared.T, upper=False).square().sum(0)
        spread = (self.kernel.variance(x) - known).clamp_min(0).sqrt()
        return shared @ self.weights * self.std + self.mean, spread * self.std


def conditioned(kernel: Kernel, features: Tensor, targets: Tensor) -> KernelRegression:
    """The regression of a kernel on features (m, k) and targets (m,), which are standardised for it."""
    mean, std = float(targets.mean()), float(targets.std()) or 1.0
    centre = features.mean(0)
    factor = _factor(kernel, features - centre)
    weights = torch.cholesky_solve(((targets - mean) / std)[:, None], factor)[:, 0]
    return KernelRegression(
        kernel=kernel,
        rows=features - centre,
        centre=centre,
        factor=factor,
        targets=targets,
        weights=weights,
        mean=mean,
        std=std,
    )


def fit(
    features: Tensor, groups: Tensor, targets: Tensor, config: KernelConfig | None = None, seed: int = 0
) -> KernelRegression:
    """Fit features (m, k), which are in `groups` (k,) from 0 on, to targets (m,). All are float64 but the groups.

    The same seed gives the same numbers on one machine.
    """
    config = config or KernelConfig()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))[: config.most_rows]
    x, y = features[order] - features[order].mean(0), targets[order]
    y = (y - y.mean()) / (float(y.std()) or 1.0)
    logs = first_logs(x, int(groups.max()) + 1)
    optimizer = torch.optim.Adam([logs], lr=config.lr)
    for _ in Progress(range(config.steps), "predictor", config.steps, unit="step"):
        optimizer.zero_grad()
        loss = negative_log_likelihood(kernel_of(logs, groups), x, y)
        (loss + 0.5 * (logs[4:] / config.prior).square().sum()).backward()
        optimizer.step()
    return conditioned(kernel_of(logs.detach(), groups), features, targets)


def first_logs(x: Tensor, n_groups: int) -> Tensor:
    """(4 + 2 groups,) the parameters to begin with, as logarithms, for centred features x (m, k).

    They are the common sizes of linear and of near weights, amplitude and noise; then the weight of each group
    relative to its common size, of the linear ones first. Targets have the variance 1. At first a row has about twice
    that by the linear kernel, the squared-exponential one falls to exp(-1/2) at the mean squared distance, and the
    noise is a tenth.
    """
    distance = 2 * float(x.square().sum(1).mean())  # mean squared distance of two rows
    sizes = torch.tensor([4 / max(distance, 1e-9), 0.5 / max(distance, 1e-9), 1.0, 0.1], dtype=torch.float64)
    return torch.cat([sizes.log(), torch.zeros(2 * n_groups, dtype=torch.float64)]).requires_grad_()


def kernel_of(logs: Tensor, groups: Tensor) -> Kernel:
    """The kernel of the parameters, as `first_logs` orders them."""
    linear, near = logs[4:].view(2, -1)[:, groups] + logs[:2, None]
    return Kernel(linear=linear.exp(), near=near.exp(), amplitude=logs[2].exp(), noise=logs[3].exp())


def negative_log_likelihood(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """-log p(y | x) of the process with the kernel, less the constant m/2 log(2 pi)."""
    factor = _factor(kernel, x)
    weights = torch.cholesky_solve(y[:, None], factor)[:, 0]
    return 0.5 * y @ weights + factor.diagonal().log().sum()


def _factor(kernel: Kernel, x: Tensor) -> Tensor:
    noise = (kernel.noise + LEAST_NOISE) * torch.eye(len(x), dtype=x.dtype)
    return torch.linalg.cholesky(kernel(x, x) + noise)
