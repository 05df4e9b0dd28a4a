"""The accuracy predictor: an MLP from one-hot subnets to top-1, or several side by side.

APQ (Wang et al., CVPR 2020, arXiv 2006.08509), section 3.2: a predictor trained on many full-precision subnets is
transferred to quantized ones, which are expensive to measure, by adding an input for the bits.

Several MLPs (*members*) that differ in their first weights and in the order of their pairs predict by their mean. Their
spread says where they do not agree (deep ensembles, Lakshminarayanan et al., NeurIPS 2017, arXiv 1612.01474).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apq.presets import APQ_IMAGENET
from apq.space import SearchSpace
from apq.subnet import Subnet
from utils.converter import Converter
from utils.encoding_layout import chooses_as_qfa
from utils.fast_predictor import FastPredictor


class AccuracyPredictor(nn.Module):
    """MLP with the first layer relu(W x_arch + b) + Q x_policy + q, then `n_layers - 1` ReLU layers and a regressor.

    In spaces with QFA's choices it is a plain MLP, with the first layer relu(W x_arch + b + Q x_policy + q).

    `quantize=False` builds the full-precision predictor, without Q, which reads the architecture half alone. State dict
    keys are the published ones: `layers.<i>.0.*`, `quantize_fc.*`, `regressor.*`. Those of several `members`, each of
    them `hidden` wide, have one more axis in front.
    """

    def __init__(
        self,
        space: SearchSpace = APQ_IMAGENET,
        hidden: int = 400,
        n_layers: int = 3,
        quantize: bool = True,
        members: int = 1,
    ) -> None:
        super().__init__()
        self.space, self.hidden, self.n_layers, self.quantize = space, hidden, n_layers, quantize
        self.members = members
        self.converter, self.plain = Converter(space), chooses_as_qfa(space)
        widths = [self.converter.half_dim, *[hidden] * n_layers]
        self.layers = nn.ModuleList(
            nn.Sequential(_linear(n_in, n_out, members), nn.ReLU()) for n_in, n_out in itertools.pairwise(widths)
        )
        if quantize:
            self.quantize_fc = _linear(self.converter.full_dim - self.converter.half_dim, hidden, members)
        self.regressor = _linear(hidden, 1, members)

    def forward(self, features: Tensor) -> Tensor:
        """(n, full_dim) -> (n,), of several members (members, n), whose features may differ: (members, n, full_dim).

        A full-precision predictor reads the first half_dim features alone.
        """
        half = self.converter.half_dim
        first, relu = self.layers[0]
        x = first(features[..., :half])  # (n, hidden) or (members, n, hidden)
        if not self.quantize:
            x = relu(x)
        elif self.plain:
            x = relu(x + self.quantize_fc(features[..., half:]))
        else:
            x = relu(x) + self.quantize_fc(features[..., half:])
        for layer in self.layers[1:]:
            x = layer(x)
        return self.regressor(x).squeeze(-1)

    def predict_accuracy(self, specs: Sequence[Mapping[str, Any] | Subnet]) -> np.ndarray:
        """(specs,) float32 accuracies of published specs or subnets, with their policies."""
        return self.predict(self.converter.genes_of_specs(list(specs)))

    def predict(self, genes: np.ndarray) -> np.ndarray:
        """(n,) float32 accuracies of a gene matrix. Each call folds the weights: for many calls, call `fast()` once."""
        return self.fast()(genes)

    @property
    def has_spread(self) -> bool:
        """Whether there are several members, which may disagree."""
        return self.members > 1

    def mean_and_spread(self, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) means and (n,) standard deviations over the members, as `FastPredictor.mean_and_spread`."""
        return self.fast().mean_and_spread(genes)

    def fast(self, device: torch.device | str = "cpu") -> FastPredictor:
        """The predictor with its present weights folded for speed. It does not follow later changes of the weights."""
        return FastPredictor(self, torch.device(device))


class ManyLinear(nn.Module):
    """`members` linear layers as one batched product: (n, n_in) or (members, n, n_in) -> (members, n, n_out).

    The first weights of each are drawn as those of `nn.Linear`.
    """

    def __init__(self, n_in: int, n_out: int, members: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(members, n_out))
        bound = n_in**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.transpose(1, 2) + self.bias[:, None]


def _linear(n_in: int, n_out: int, members: int) -> nn.Module:
    return nn.Linear(n_in, n_out) if members == 1 else ManyLinear(n_in, n_out, members)


def transfer(predictor: AccuracyPredictor, members: int | None = None) -> AccuracyPredictor:
    """A quantized predictor that starts from a full-precision one: weights are copied, the layer of the bits is zero.

    At first it predicts the full-precision accuracy for every policy. The zero layer can learn, because its gradient
    passes through the trained layers after it. Several `members` (None: as many as `predictor` has) start from one each
    or all from the only one.
    """
    members = members or predictor.members
    quantized = AccuracyPredictor(predictor.space, predictor.hidden, predictor.n_layers, True, members)
    nn.init.zeros_(quantized.quantize_fc.weight)
    nn.init.zeros_(quantized.quantize_fc.bias)
    quantized.load_state_dict({**quantized.state_dict(), **copied(predictor, members)})
    return quantized


def copied(predictor: AccuracyPredictor, members: int) -> dict[str, Tensor]:
    """The state of `members` MLPs that start from those of a predictor, which are as many, or one."""
    weights = {key: value.detach().cpu() for key, value in predictor.state_dict().items()}
    if members == predictor.members:
        return weights
    return {key: value.expand(members, *value.shape) for key, value in weights.items()}


@torch.no_grad()
def scale_output(predictor: AccuracyPredictor, factor: float, shift: float) -> None:
    """Make a predictor output `factor * accuracy + shift`, by changing its regressor in place."""
    predictor.regressor.weight.mul_(factor)
    predictor.regressor.bias.mul_(factor).add_(shift)
