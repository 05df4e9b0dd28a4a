"""The optimizer of all trainings: SGD that moves learned clips and steps of quantizers by fractions of their size.

They are in the units of the values that are quantized. If all values were c times larger, the gradient of a clip r
would be c times smaller, and a step of plain SGD 1 / c^2 of what it should be: small clips would be thrown beyond zero,
large ones would never move. So the step is taken in t = u log |r|, where u is the usual size of such a clip. The
gradient of t is r/u dL/dr. It does not depend on the units, and neither do its momentum, its clipping and its step. At
r = u it is dL/dr, and the step is that of plain SGD.

A clip far below its values has a large dL/dr, but hardly any gradient of t: it would stay there. So r in r/u is at
least a fraction of the clip with which training began, which is in the same units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elastic_nn.modules.quant_layers import learned_parameters, relative_parameters
from elastic_nn.training.recipe import TrainConfig

FLOOR = 1 / 8  # of a clip's size when training began: what counts for its step, however small it has become
LARGEST_STEP = math.log(2)  # a clip at most doubles or halves in one step, however high the learning rate


class ScaleFreeSGD(torch.optim.SGD):
    """SGD with `relative` parameters, each with its usual size, which are stepped in their logarithms.

    They are in the group "ranges". Its "floors" are the least sizes that count for the steps of its parameters.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], relative: Mapping[nn.Parameter, float], **settings: Any
    ) -> None:
        super().__init__(groups, **settings)
        self.relative = dict(relative)
        for group in self.param_groups:
            if group.get("name") == "ranges":
                group["floors"] = [FLOOR * p.abs().max().item() for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step. In it a relative parameter stands for the change of its t, which starts at 0."""
        floors = self._floors()
        moved = [(p, p.clone(), usual) for p, usual in self.relative.items() if p.grad is not None]
        for p, _, _ in moved:
            p.grad = self._gradient(p, floors)
            p.zero_()
        super().step()
        for p, before, usual in moved:
            p.div_(usual).clamp_(-LARGEST_STEP, LARGEST_STEP).exp_().mul_(before)

    @torch.no_grad()
    def clip_gradients(self, norm: float, *, together: bool = False) -> None:
        """Clip the norm of all gradients; that of the group "ranges" apart, with the gradients of t.

        With `together` it is the norm of the plain gradients of all parameters, as in QFA's code.
        """
        if together:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], norm)
            return
        groups = {group["name"]: group["params"] for group in self.param_groups}
        nn.utils.clip_grad_norm_([*groups["decayed"], *groups["free"]], norm)
        relative = [p for p in groups["ranges"] if p in self.relative and p.grad is not None]
        floors = self._floors()
        logarithms = [torch.zeros_like(p) for p in relative]  # stand for each t
        for p, t in zip(relative, logarithms, strict=True):
            t.grad = self._gradient(p, floors)
        others = [p for p in groups["ranges"] if p not in self.relative]
        total = nn.utils.clip_grad_norm_([*others, *logarithms], norm)
        factor = (norm / (total + 1e-6)).clamp_max(1.0)  # by which torch clips
        for p in relative:
            p.grad.mul_(factor)

    def _floors(self) -> dict[nn.Parameter, float]:
        ranges = (group for group in self.param_groups if "floors" in group)
        return {p: floor for group in ranges for p, floor in zip(group["params"], group["floors"], strict=True)}

    def _gradient(self, parameter: nn.Parameter, floors: Mapping[nn.Parameter, float]) -> Tensor:
        """The gradient of t of a relative parameter."""
        size = parameter.abs().clamp_min(floors.get(parameter, 0.0)).copysign(parameter)
        return parameter.grad * size / self.relative[parameter]


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
        relative_parameters(net),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
