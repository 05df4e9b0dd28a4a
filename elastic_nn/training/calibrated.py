"""A float network with the ranges of every bit-width, so that any policy, or one operand alone, can be tried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from apq.policy import QUANTIZERS, Policy
from elastic_nn.modules.quant_layers import quantized_layers, quantizers_off
from elastic_nn.networks.quantize_model import quantize_model, set_policy
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.calibration import calibration_table, signed_inputs
from elastic_nn.training.pruned import keep_zeros

OPERANDS = ("weight_quant", "act_quant")  # of a layer, in the order of the bits of a policy


class CalibratedNetwork:
    """A trained float network that takes the bits of one policy after the other.

    The network is quantized in place. The ranges or clusters of its layers `names` are chosen once for all bit-widths,
    at construction, from `images` (N, C, H, W). With `zeros_stay`, weights that are zero stay zero.
    """

    def __init__(
        self, net: nn.Module, names: Sequence[str], quantizer: str, images: Tensor, *, zeros_stay: bool = False
    ) -> None:
        self.net, self.names = net, tuple(names)
        signed = signed_inputs(net, names, images)
        self._float = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        quantize_model(net, names, scheme_named(quantizer).quick(), signed, images.shape[1:])
        if zeros_stay:
            keep_zeros(net)
        self._states = calibration_table(net, images, QUANTIZERS[quantizer].bits)

    def restore(self, policy: Policy) -> None:
        """Go back to the float weights, with the bits of a policy and their ranges."""
        self._restore_weights()
        set_policy(self.net, policy)
        for name, layer in quantized_layers(self.net).items():
            for kind, quantizer in layer.operands().items():
                quantizer.load_state_dict(self._states[name, kind, quantizer.bits])

    @contextlib.contextmanager
    def in_float(self) -> Iterator[nn.Module]:
        """Context in which the network has its float weights and nothing is quantized. Yields the network."""
        self._restore_weights()
        with quantizers_off(self.net):
            yield self.net

    @contextlib.contextmanager
    def alone(self, layer: int, operand: int, bits: int) -> Iterator[nn.Module]:
        """As `in_float`, but one operand (0 weights, 1 activations) of one of `names` is quantized."""
        name, kind = self.names[layer], OPERANDS[operand]
        quantizer = quantized_layers(self.net)[name].operands()[kind]
        with self.in_float() as net:
            quantizer.bits, quantizer.enabled = bits, True
            quantizer.load_state_dict(self._states[name, kind, bits])
            yield net

    def _restore_weights(self) -> None:
        with torch.no_grad():
            for key, tensor in self.net.state_dict().items():
                if key in self._float:
                    tensor.copy_(self._float[key])
