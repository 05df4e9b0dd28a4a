"""The elastic supernet over a search space, in full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from apq.errors import UserError
from apq.files import Record
from apq.genes import largest_subnet, sample, subnets_of, with_highest_bits
from apq.presets import published_space
from apq.space import SearchSpace
from apq.subnet import Subnet, architecture_of, policy_of, subnet_from_spec
from elastic_nn.modules.convolution import without_plans
from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.networks.checkpoint_layout import from_published, to_published
from elastic_nn.networks.mbconv_net import MBConvNet, supernet_blocks
from elastic_nn.networks.subnet import extract_subnet
from elastic_nn.quantizers import FLOAT, QuantScheme


class DynamicProxylessNASNets(MBConvNet):
    """A supernet: its parts are all subnets of a space. At first its largest subnet is active.

    Choose a subnet with `activate`, or with the published calls, which take the lists of an `arch` file. The positional
    arguments are the published ones and describe a space; give any other space as `space`.
    """

    def __init__(
        self,
        n_classes: int = 1000,
        bn_param: tuple[float, float] | None = None,
        dropout_rate: float = 0.0,
        base_stage_width: str = "proxyless",
        width_mult_list: float | Sequence[float] = 1.0,
        ks_list: int | Sequence[int] = (3, 5, 7),
        expand_ratio_list: float | Sequence[float] = (4, 6),
        depth_list: int | Sequence[int] = (2, 3, 4),
        *,
        space: SearchSpace | None = None,
        scheme: QuantScheme = FLOAT,
    ) -> None:
        if space is None:
            if len(_as_tuple(width_mult_list)) != 1:
                raise UserError(f"width_mult_list is {width_mult_list}; width multipliers are not searched: give one")
            (width_mult,) = _as_tuple(width_mult_list)
            choices = (_as_tuple(values) for values in (ks_list, expand_ratio_list, depth_list))
            space = published_space(n_classes, base_stage_width, width_mult, *choices)
        super().__init__(space, supernet_blocks(space), scheme)
        if bn_param is not None:
            self.set_bn_param(*bn_param)
        self.dropout.p = dropout_rate
        self.space, self.active = space, largest_subnet(space)
        self.activate(self.active)

    @without_plans()
    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, classes), by the active subnet
        return super().forward(x)

    def activate(self, subnet: Subnet) -> None:
        """Run as this subnet from now on. It must be a canonical one of the network's space."""
        if subnet != self.active:
            self.forget_ranges()
        blocks = [0]
        for slot in subnet.running_slots(self.space):
            i = slot.index
            self.blocks[i + 1].set_shape(subnet.ks[i], subnet.mid_channels(slot))
            self.set_block_bits(i + 1, self.space, tuple(row[i] for row in subnet.bits))
            blocks.append(i + 1)
        self.set_shared_bits(self.space, subnet.shared_bits)
        self.active_blocks = tuple(blocks)
        self.active = subnet
        self._spec = {**architecture_of(self.space, subnet), **policy_of(self.space, subnet)}

    def set_active_subnet(
        self,
        wid: None = None,
        ks: int | Sequence[int] | None = None,
        e: float | Sequence[float] | None = None,
        d: int | Sequence[int] | None = None,
        resolution: int | None = None,
    ) -> None:
        """Choose the architecture by the lists of a published spec, or by one number for all entries.

        None keeps the present choice. The policy stays, but blocks whose bits a rule forbids with the new kernel run at
        their highest bits until a policy is set. UserError if the architecture is illegal.
        """
        lengths = {"ks": len(self.space.slots), "e": len(self.space.slots), "d": len(self.space.stages)}
        given = {"wid": wid, "ks": ks, "e": e, "d": d, "resolution": resolution}
        spec = {
            **self._spec,
            **{
                key: [value] * lengths[key] if isinstance(value, (int, float)) and key in lengths else value
                for key, value in given.items()
                if value is not None
            },
        }
        self._activate_spec(spec, {**spec, **_legal_policy(self.space, spec)})

    def _activate_spec(self, spec: Mapping[str, Any], legal: Mapping[str, Any]) -> None:
        """Run as the legal spec, and keep `spec`, with its idle slots, for the next call that changes a part of it."""
        self.activate(subnet_from_spec(self.space, legal))
        self._spec = dict(spec)

    def set_bn_param(self, momentum: float, eps: float) -> None:
        """Set momentum and epsilon of every BatchNorm."""
        for module in self.modules():
            if isinstance(module, ElasticBatchNorm2d):
                module.momentum, module.eps = momentum, eps

    def load_weights_from_net(self, state: Mapping[str, Any]) -> None:
        """Load weights in a published layout, quantized or float; all of them or none.

        Float weights leave the ranges of quantizers as they are. UserError names missing, extra and misshapen keys.
        """
        self.load_state_dict(from_published(state, self), strict=False)

    load_weights_from_proxylessnas = load_weights_from_net  # APQ's name of the same call

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights as published code would save this network. Inverse of `load_weights_from_net`.

        UserError for networks that no published code has.
        """
        return to_published(self)

    def sample_active_subnet(self, rng: np.random.Generator) -> Record:
        """Choose an architecture at random and return its published spec, without a policy."""
        genes = with_highest_bits(self.space, sample(self.space, 1, rng))
        self.activate(subnets_of(self.space, genes)[0])
        return architecture_of(self.space, self.active)

    def get_active_subnet(self) -> MBConvNet:
        """The active subnet as a network of its own, with copies of weights, statistics and ranges."""
        return extract_subnet(self, self.space, self.active)


def _as_tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (list, tuple)) else (values,)


def _legal_policy(space: SearchSpace, spec: Mapping[str, Any]) -> dict[str, list[int]]:
    """The policy of a spec, with the highest bits where a rule forbids its bits with its kernels."""
    policy = {kind.setting: list(spec[kind.setting]) for kind in space.operands}
    for rule in space.forbidden:
        kind = next(kind for kind in space.operands if kind.name == rule.operand)
        bits = policy[kind.setting]
        policy[kind.setting] = [
            kind.choices[-1] if kernel == rule.kernel_size and b == rule.bits else b
            for kernel, b in zip(spec["ks"], bits, strict=False)
        ] + bits[len(spec["ks"]) :]
    return policy
