"""The elastic supernet over a search space, in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from apq.genes import genes_of, largest_subnet, sample, subnets_of, view
from apq.presets import APQ_IMAGENET
from apq.space import SearchSpace
from apq.subnet import Subnet, architecture_of, policy_of, subnet_from_spec
from elastic_nn.networks.mbconv_net import MBConvNet, supernet_shape
from elastic_nn.networks.subnet import extract_subnet
from elastic_nn.quantizers import FLOAT, QuantScheme


class DynamicProxylessNASNets(MBConvNet):
    """A network of which every subnet of the space is a part. It starts as its largest subnet.

    Choose a part with `activate` (a Subnet) or with the published calls, which take the lists of an `arch` file.
    """

    def __init__(self, space: SearchSpace = APQ_IMAGENET, scheme: QuantScheme = FLOAT) -> None:
        super().__init__(supernet_shape(space), scheme)
        self.space = space
        self.active = largest_subnet(space)
        self.activate(self.active)

    def activate(self, subnet: Subnet) -> None:
        """Run as this subnet (of the network's space, canonical) from now on."""
        blocks = [0]
        for slot in self.space.slots:
            if slot.position < subnet.d[slot.stage]:
                i = slot.index
                self.blocks[i + 1].set_shape(subnet.ks[i], round(subnet.e[i] * slot.in_channels))
                self.set_block_bits(i + 1, self.space, tuple(row[i] for row in subnet.bits))
                blocks.append(i + 1)
        self.active_blocks = tuple(blocks)
        self.active = subnet

    def set_active_subnet(
        self,
        ks: Sequence[int],
        e: Sequence[float],
        d: Sequence[int],
        wid: None = None,
        resolution: int | None = None,
    ) -> None:
        """Choose the architecture by the lists of a published spec; the policy stays. UserError if illegal."""
        spec = {"wid": wid, "ks": ks, "e": e, "d": d, **policy_of(self.space, self.active)}
        self.activate(subnet_from_spec(self.space, spec if resolution is None else {**spec, "resolution": resolution}))

    def sample_active_subnet(self, rng: np.random.Generator) -> dict[str, Any]:
        """Choose an architecture at random and return its published spec; a float network has no policy to draw."""
        genes = sample(self.space, 1, rng)
        view(self.space, genes).bits[:] = view(self.space, genes_of(self.space, [largest_subnet(self.space)])).bits
        self.activate(subnets_of(self.space, genes)[0])
        return architecture_of(self.space, self.active)

    def get_active_subnet(self) -> MBConvNet:
        """The active subnet as a network of its own, with copies of the weights, statistics and ranges."""
        return extract_subnet(self, self.space, self.active)
