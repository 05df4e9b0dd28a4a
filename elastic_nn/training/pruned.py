"""Pruned networks: weights that are zero stay zero while they are quantized and trained."""

from __future__ import annotations

from torch import Tensor, nn

from elastic_nn.modules.quant_layers import quantized_layers


def keep_zeros(net: nn.Module) -> None:
    """Keep the weights of quantized layers that are zero now at zero, through calibration and training.

    Their gradients become zero, so that neither momentum nor decay moves them, and quantizers give them no code but
    that of zero (see `Quantizer.keeps_zeros`).
    """
    for layer in quantized_layers(net).values():
        layer.weight_quant.keeps_zeros = True
        kept = layer.weight.detach() != 0

        def masked(grad: Tensor, kept: Tensor = kept) -> Tensor:
            return grad * kept

        layer.weight.register_hook(masked)


def weights_left(net: nn.Module, names: tuple[str, ...]) -> list[int]:
    """The number of weights other than zero of each named layer."""
    return [int(net.get_submodule(name).weight.count_nonzero()) for name in names]
