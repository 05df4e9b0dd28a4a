"""The elastic supernet with quantizers: the same network with another scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apq.errors import UserError
from apq.files import Record
from apq.genes import sample, subnets_of
from apq.space import SearchSpace
from apq.subnet import architecture_of, policy_of
from elastic_nn.modules.quant_layers import quantizer_keys
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.quantizers import LINEAR, QuantScheme


class DynamicQuantizedProxylessNASNets(DynamicProxylessNASNets):
    """A supernet whose subnets also choose the bits of each block."""

    def __init__(
        self, *published: Any, space: SearchSpace | None = None, scheme: QuantScheme = LINEAR, **named: Any
    ) -> None:
        super().__init__(*published, space=space, scheme=scheme, **named)

    def set_quantization_policy(self, **settings: Sequence[int]) -> None:
        """Choose the bits by the lists of a published policy. The architecture stays. UserError if they are illegal."""
        spec = {**self._spec, **settings}
        self._activate_spec(spec, spec)

    def sample_active_subnet(self, rng: np.random.Generator) -> Record:
        """Choose architecture and policy at random and return their published spec."""
        self.activate(subnets_of(self.space, sample(self.space, 1, rng))[0])
        return {**architecture_of(self.space, self.active), **policy_of(self.space, self.active)}

    def load_float_weights(self, state: Mapping[str, Any]) -> None:
        """Load the weights of a float supernet. The quantizers keep their ranges and steps."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        own = quantizer_keys(self)
        if wrong := [key for key in (*missing, *unexpected) if key not in own]:
            raise UserError(f"not a float supernet of space {self.space.name}: {wrong[0]} does not fit")
