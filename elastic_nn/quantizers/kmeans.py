"""k-means quantization of weights (Han et al., arXiv 1510.00149; HAQ, CVPR 2019).

A layer of b bits stores 2^b values, its centroids, and for each weight the index of its centroid, the label. Training
changes the centroids. The labels are chosen once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from apq.errors import UserError
from elastic_nn.quantizers.base import Quantizer

MOST_CLUSTERS = 256  # labels are uint8
MAX_ITER, QUICK_ITER = 50, 3  # iterations before a finetune, and to compare policies (HAQ)


def fit_kmeans(
    values: np.ndarray, bits: int, *, max_iter: int, seed: int, most: int = MOST_CLUSTERS
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster numbers by scikit-learn's k-means into 2^bits groups, or fewer if there are fewer distinct values.

    There are at most `most` groups. Returns uint8 labels of the shape of `values`, and (groups,) float32 centroids in
    ascending order.
    """
    from sklearn.cluster import KMeans  # slow to import, and needed here only
    from sklearn.exceptions import ConvergenceWarning

    flat = np.asarray(values, dtype=np.float32).reshape(-1, 1)
    groups = min(2**bits, len(np.unique(flat)), most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal centroids do no harm
        fitted = KMeans(groups, init="k-means++", n_init=1, max_iter=max_iter, random_state=seed).fit(flat)
    order = np.argsort(fitted.cluster_centers_[:, 0])
    rank = np.empty(groups, dtype=np.uint8)
    rank[order] = np.arange(groups)
    return rank[fitted.labels_].reshape(values.shape), fitted.cluster_centers_[order, 0].astype(np.float32)


def fit_nonzero(values: np.ndarray, bits: int, *, max_iter: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`fit_kmeans` of the values other than zero, of which pruned weights have no part. Zeros have a centroid of 0."""
    kept = values != 0
    if kept.all():
        return fit_kmeans(values, bits, max_iter=max_iter, seed=seed)
    if not kept.any():
        return np.zeros(values.shape, dtype=np.uint8), np.zeros(1, dtype=np.float32)
    own, centroids = fit_kmeans(values[kept], bits, max_iter=max_iter, seed=seed, most=MOST_CLUSTERS - 1)
    zero = int(np.searchsorted(centroids, 0))
    labels = np.full(values.shape, zero, dtype=np.uint8)
    labels[kept] = own + (own >= zero)
    return labels, np.insert(centroids, zero, 0)


class KMeansWeightQuantizer(Quantizer):
    """Replaces weights by their centroids, which training changes. `calibrate` clusters the weights anew.

    `max_iter` is the most iterations of k-means.
    """

    data_dependent = ("centroids", "labels")

    def __init__(self, max_iter: int = MAX_ITER) -> None:
        super().__init__(signed=True)
        self.max_iter, self.seed = max_iter, 0
        self.centroids = nn.Parameter(torch.zeros(0))  # (up to 2^bits,)
        self.register_buffer("labels", torch.zeros(0, dtype=torch.uint8))  # of the shape of the weights

    def quantize(self, v: Tensor) -> Tensor:
        if self.labels.shape != v.shape:
            raise UserError(f"k-means has not clustered the weights of {self.label}: calibrate the network first")
        return _Shared.apply(self._values(), self.labels)

    def _values(self) -> Tensor:
        """The centroids, of which one at zero is that of zero weights, which no step moves."""
        return self.centroids * (self.centroids != 0) if self.keeps_zeros else self.centroids

    def codebook(self) -> tuple[Tensor, Tensor]:
        return self.labels, self._values().detach()

    @torch.no_grad()
    def calibrate(self, v: Tensor) -> None:
        """Cluster the weights. Equal weights give equal clusters. Where zeros are kept, they are one more cluster.

        Of several calls the last counts, because there is one label for each weight. In a network all calls for a layer
        have the same weights.
        """
        fit = fit_nonzero if self.keeps_zeros else fit_kmeans
        labels, centroids = fit(v.float().cpu().numpy(), self.bits, max_iter=self.max_iter, seed=self.seed)
        self.labels = torch.from_numpy(labels).to(v.device)
        self.centroids.data = torch.from_numpy(centroids).to(v)

    @torch.no_grad()
    def forget(self) -> None:
        self.labels = self.labels.new_zeros(0)
        self.centroids.data = self.centroids.data.new_zeros(0)

    def learned_parameters(self) -> list[nn.Parameter]:
        """None, because centroids are trained as weights."""
        return []

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest label."""
        return 0, 2**self.bits - 1

    def scale_and_zero_point(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise UserError(f"the weights of {self.label} are k-means centroids, which have no scale and no zero point")

    def check_state(self, state: Mapping[str, Any], shape: torch.Size | None) -> None:
        centroids, labels = (state.get(name) for name in self.data_dependent)
        if not (isinstance(centroids, Tensor) and isinstance(labels, Tensor)):
            raise UserError(f"layer {self.label} lacks its clusters")
        most = 2**self.bits + bool((centroids == 0).any())  # zero weights may have one more
        fits = labels.shape == shape and 1 <= len(centroids) <= most
        if not fits or int(labels.max()) >= len(centroids):
            raise UserError(f"the clusters of layer {self.label} do not fit its weights and bits")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Resize the clusters to those of the state, because their number depends on bits and weights."""
        for name in self.data_dependent:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != own.shape:
                own.data = own.data.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Shared(torch.autograd.Function):
    """The centroid of each weight. The gradient of a centroid is the mean over its weights, not the sum, so that one
    learning rate fits large and small clusters (HAQ)."""

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
