"""Weights that share a few values: k-means quantization (Han et al., arXiv 1510.00149; HAQ, CVPR 2019).

A layer of b bits stores 2^b values, its centroids, and for each weight the number of its centroid. Training moves the
centroids; which weights share one is decided once.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from apq.errors import UserError


def fit_kmeans(values: np.ndarray, bits: int, *, max_iter: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster scalars by scikit-learn's k-means into 2^bits groups, or fewer where there are fewer different values.

    Returns uint8 labels of the shape of `values`, and (groups,) float32 centroids, ascending.
    """
    from sklearn.cluster import KMeans  # takes a second, and only this needs it
    from sklearn.exceptions import ConvergenceWarning

    flat = np.asarray(values, dtype=np.float32).reshape(-1, 1)
    groups = min(2**bits, len(np.unique(flat)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # two centroids of equal value do no harm
        fitted = KMeans(groups, init="k-means++", n_init=1, max_iter=max_iter, random_state=seed).fit(flat)
    order = np.argsort(fitted.cluster_centers_[:, 0])
    rank = np.empty(groups, dtype=np.uint8)
    rank[order] = np.arange(groups)
    return rank[fitted.labels_].reshape(values.shape), fitted.cluster_centers_[order, 0].astype(np.float32)


class KMeansWeightQuantizer(nn.Module):
    """Replaces weights by their centroids, which are learned; `calibrate` clusters them anew.

    `max_iter` bounds the k-means iterations: HAQ takes 3 while searching and 50 before the finetune.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bits, self.enabled, self.max_iter, self.seed = 8, True, 50, 0
        self.centroids = nn.Parameter(torch.zeros(0))  # (up to 2^bits,)
        self.register_buffer("labels", torch.zeros(0, dtype=torch.uint8))  # of the shape of the weights

    def forward(self, w: Tensor) -> Tensor:
        if not self.enabled:
            return w
        if self.labels.shape != w.shape:
            raise UserError("k-means has not clustered these weights: calibrate the network first")
        return _Shared.apply(self.centroids, self.labels)

    @torch.no_grad()
    def calibrate(self, w: Tensor) -> None:
        """Cluster the weights."""
        labels, centroids = fit_kmeans(w.float().cpu().numpy(), self.bits, max_iter=self.max_iter, seed=self.seed)
        self.labels = torch.from_numpy(labels).to(w.device)
        self.centroids.data = torch.from_numpy(centroids).to(w)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The clusters come with their number and shape, which depend on the bits and the layer."""
        for name in ("centroids", "labels"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != own.shape:
                own.data = own.data.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class _Shared(torch.autograd.Function):
    """Centroids spread over the weights; the gradient of a centroid is the mean over its weights, not their sum, so
    that one learning rate serves large and small clusters (HAQ)."""

    @staticmethod
    def forward(ctx: FunctionCtx, centroids: Tensor, labels: Tensor) -> Tensor:
        index = labels.flatten().long()
        ctx.save_for_backward(index)
        ctx.n = len(centroids)
        return centroids[index].view(labels.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        sums = grad.new_zeros(ctx.n).index_add_(0, index, grad.flatten())
        return sums / torch.bincount(index, minlength=ctx.n).clamp_min(1), None
