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
from collections.abc import Iterable, Mapping, Sequence
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
        self._constants: tuple[Tensor, Tensor] | None = None  # on the device: a copy in every step would wait for it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step. In it a relative parameter stands for the change of its t, which starts at 0."""
        moved = self._gradients()
        if not moved:
            self._step_plainly()
            return
        before, usual = self._flat(), self._usual_and_floors()[0]
        for p, gradient in moved.items():
            p.grad = gradient
        torch._foreach_zero_(list(moved))
        self._step_plainly()
        after = (self._flat() / usual).clamp_(-LARGEST_STEP, LARGEST_STEP).exp_().mul_(before)
        values = self._split(after)
        torch._foreach_copy_(list(moved), [values[p] for p in moved])

    def _step_plainly(self) -> None:
        """SGD; on a GPU in one kernel for many parameters. A state does not record which, so it fits all devices."""
        for group in self.param_groups:
            group["fused"] = True if steps_fused(group["params"]) else None
            for p in group["params"] if group["fused"] and group["momentum"] else ():
                if p.grad is not None and self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)  # torch: all have one, or none
        try:
            super().step()
        finally:
            for group in self.param_groups:
                group["fused"] = None

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
        others, gradients = [p for p in groups["ranges"] if p not in self.relative], self._gradients()
        logarithms = []  # one tensor stands for every t
        if gradients:
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients.values()])
            logarithms.append(torch.empty_like(flat))
            logarithms[0].grad = flat
        total = nn.utils.clip_grad_norm_([*others, *logarithms], norm)
        if gradients:
            factor = (norm / (total + 1e-6)).clamp_max(1.0)  # by which torch clips
            torch._foreach_mul_([p.grad for p in gradients], factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._constants = None  # floors are in the state

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        """The gradients of t of the relative parameters that have one. All are computed at once: they are many."""
        having = [p for p in self.relative if p.grad is not None]
        if not having:
            return {}
        sizes, (usual, floors) = self._flat(), self._usual_and_floors()
        # Those of subnets that did not run have none. What stands in their place is not used.
        gradients = torch.cat([(p if p.grad is None else p.grad).reshape(-1) for p in self.relative])
        of_t = self._split(gradients * torch.maximum(sizes.abs(), floors).copysign(sizes) / usual)
        return {p: of_t[p] for p in having}

    def _flat(self) -> Tensor:
        """The relative parameters in one vector."""
        return torch.cat([p.reshape(-1) for p in self.relative])

    def _split(self, flat: Tensor) -> dict[nn.Parameter, Tensor]:
        """A vector like that of `_flat`, cut into tensors like the relative parameters."""
        parts = flat.split([p.numel() for p in self.relative])
        return {p: part.view_as(p) for p, part in zip(self.relative, parts, strict=True)}

    def _usual_and_floors(self) -> tuple[Tensor, Tensor]:
        """The usual sizes of the relative parameters, and the least that count, in vectors like that of `_flat`."""
        if self._constants is None:
            ranges = (group for group in self.param_groups if "floors" in group)
            floors = {p: floor for group in ranges for p, floor in zip(group["params"], group["floors"], strict=True)}
            columns = [self.relative.values(), [floors.get(p, 0.0) for p in self.relative]]
            self._constants = tuple(
                torch.cat(
                    [torch.full_like(p, value).reshape(-1) for p, value in zip(self.relative, column, strict=True)]
                )
                for column in columns
            )
        return self._constants


def steps_fused(params: Sequence[Tensor]) -> bool:
    """Whether torch's fused SGD steps these parameters: it saves launches of kernels, which a CPU has not."""
    return bool(params) and params[0].is_cuda


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
