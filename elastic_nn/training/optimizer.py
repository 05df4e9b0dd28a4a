"""The optimizer of all trainings: SGD that moves the scales of quantizers by fractions of their size.

A scale is a learned clip or step in the units of the values that are quantized. If all values were c times larger, the
gradient of a scale s would be c times smaller, and a step of plain SGD 1 / c^2 of what it should be: small scales would
be thrown beyond zero, large ones would never move. So the step is taken in t = u log |s|, where u is the usual size of
such a scale. The gradient of t is s/u dL/ds. It does not depend on the units, and neither do its momentum, its clipping
and its step. At s = u it is dL/ds, and the step is that of plain SGD.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elastic_nn.modules.quant_layers import learned_parameters, learned_scales
from elastic_nn.training.recipe import TrainConfig

LARGEST_STEP = math.log(2)  # a scale at most doubles or halves in one step, however high the learning rate


class ScaleFreeSGD(torch.optim.SGD):
    """SGD whose `scales` are stepped in their logarithms. They are among the parameters, each with its usual size."""

    def __init__(self, groups: Iterable[dict[str, Any]], scales: Mapping[nn.Parameter, float], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.scales = dict(scales)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step. For it each scale is replaced by the change of its t, which starts at 0, and then put back."""
        moved = [(scale, scale.clone(), usual) for scale, usual in self.scales.items() if scale.grad is not None]
        for scale, _, _ in moved:
            scale.grad = self._gradient(scale)
            scale.zero_()
        super().step()
        for scale, before, usual in moved:
            scale.div_(usual).clamp_(-LARGEST_STEP, LARGEST_STEP).exp_().mul_(before)

    @torch.no_grad()
    def clip_gradients(self, norm: float) -> None:
        """Clip the norm of all gradients, that of the group "ranges" apart. Scales count by the gradient of t."""
        groups = {group["name"]: group["params"] for group in self.param_groups}
        nn.utils.clip_grad_norm_([*groups["decayed"], *groups["free"]], norm)
        ranges = [parameter for parameter in groups["ranges"] if parameter.grad is not None]
        if ranges:
            sizes = torch.stack([torch.linalg.vector_norm(self._gradient(parameter)) for parameter in ranges])
            factor = (norm / (torch.linalg.vector_norm(sizes) + 1e-6)).clamp_max(1.0)  # as torch does
            for parameter in ranges:
                parameter.grad.mul_(factor)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient of a parameter, or of t."""
        usual = self.scales.get(parameter)
        return parameter.grad if usual is None else parameter.grad * parameter / usual


def make_optimizer(net: nn.Module, config: TrainConfig) -> ScaleFreeSGD:
    """SGD with three named groups of parameters: "decayed", "free", "ranges".

    Weights are decayed. Norms, biases and kernel transforms, which start as the identity, are free of decay. Ranges,
    steps and offsets of quantizers are not decayed either. Their gradients are sums over all values that they clip or
    round, so large that they would dominate the norm of all gradients: they have a group that is clipped apart.
    """
    ranges = {id(parameter) for parameter in learned_parameters(net)}
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "free": [], "ranges": []}
    for name, parameter in net.named_parameters():
        if id(parameter) in ranges:
            groups["ranges"].append(parameter)
        else:
            groups["free" if parameter.ndim < 2 or "kernel_transforms" in name else "decayed"].append(parameter)
    decay = {"decayed": config.weight_decay, "free": 0.0, "ranges": 0.0}
    return ScaleFreeSGD(
        [{"name": name, "params": params, "weight_decay": decay[name]} for name, params in groups.items()],
        learned_scales(net),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=True,
    )
