"""Which subnets a training step of a supernet runs, at which resolutions and bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from apq.errors import UserError
from apq.genes import cardinalities, genes_of, largest_subnet, legalise, sample, smallest_subnet, subnets_of, view
from apq.space import FULL_PRECISION, SearchSpace
from apq.strata import common_bits, legal_kernels
from apq.subnet import Subnet
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.quantizers import Quantizer
from elastic_nn.training.engine import Activate
from elastic_nn.training.recipe import Phase

# QFA's published code draws the float operands of a layer one by one. Where it drew one of the two, it makes both float
# with these probabilities, or else none (`override_quantizer`).
BOTH_FLOAT = 0.2  # of convolutions
BOTH_FLOAT_CLASSIFIER = 0.666


def sample_phase(
    space: SearchSpace, elastic: tuple[str, ...], n: int, rng: np.random.Generator, reach: float = 1.0
) -> list[Subnet]:
    """Random subnets that differ from the largest one only in the elastic parts of the genes.

    Parts are "ks", "d", "e", "bits" and "resolution". For the last one only the largest choices are drawn, a fraction
    `reach` of all. "bits" includes those of shared operands.
    """
    largest = genes_of(space, [largest_subnet(space)])
    genes = np.repeat(largest, n, axis=0)
    drawn = sample(space, n, rng)
    for part in elastic:
        getattr(view(space, genes), part)[:] = getattr(view(space, drawn), part)
        if part == "bits":
            view(space, genes).shared_bits[:] = view(space, drawn).shared_bits
    if elastic and reach < 1:
        newest = getattr(view(space, genes), elastic[-1])
        choices = getattr(view(space, cardinalities(space)[None]), elastic[-1])  # (1, ...) like newest
        newest[:] = choices - 1 - np.floor(rng.random(newest.shape) * np.ceil(reach * choices)).astype(newest.dtype)
    return subnets_of(space, legalise(space, genes, rng))


def draw_subnets(net: DynamicProxylessNASNets, phase: Phase, rng: np.random.Generator) -> list[Activate]:
    """The subnets of a step, as functions that activate them and return their resolutions.

    In a phase with `float_share`, full precision is one more bit-width: random subnets have it in a random part of
    their operands, an end of the sandwich in all operands or in none.
    """
    space = net.space
    ends = [largest_subnet(space), smallest_subnet(space)] if phase.sandwich else []
    if phase.random_ends:
        ends = [with_one_kernel_and_bits(space, end, rng) for end in ends]
    n_random = phase.subnets_per_step - len(ends)
    drawn = [sample_phase(space, phase.elastic, 1, rng, phase.reach)[0] for _ in range(n_random)]
    calls = [partial(_activate, net, subnet, own=phase.own_resolutions) for subnet in (*ends, *drawn)]
    if not phase.float_share:
        return calls
    whole = [rng.random() < phase.float_share for _ in ends]
    operands = [operand for layer in quantized_layers(net).values() for operand in layer.operands().values()]
    floats = [operands if all_float else [] for all_float in whole]
    floats += [float_operands(net, phase.float_share, rng) for _ in drawn]
    return [partial(_partly_float, call, of_subnet) for call, of_subnet in zip(calls, floats, strict=True)]


def with_one_kernel_and_bits(space: SearchSpace, subnet: Subnet, rng: np.random.Generator) -> Subnet:
    """The subnet with one random kernel size in all slots and one random bit-width for all operands.

    UserError where no choice of bits is common to all operands or every pair of kernel and bits breaks a rule.
    """
    pairs = sorted(
        (space.kernel_sizes[gene], bits) for bits in common_bits(space) for gene in legal_kernels(space, bits)
    )
    if not pairs:
        raise UserError(f"space {space.name} has no bit-width for all operands")
    kernel, bits = pairs[rng.integers(len(pairs))]
    slots = len(space.slots)
    uniform = replace(
        subnet,
        ks=(kernel,) * slots,
        bits=((bits,) * slots,) * len(space.operands),
        shared_bits=(bits,) * len(space.shared_operands),
    )
    return subnets_of(space, genes_of(space, [uniform]))[0]  # canonical


def float_operands(net: DynamicProxylessNASNets, share: float, rng: np.random.Generator) -> list[Quantizer]:
    """Operands that stay float in one random subnet: a fraction `share` of them, coupled within each layer."""
    chosen: list[Quantizer] = []
    for name, layer in quantized_layers(net).items():
        operands = list(layer.operands().values())
        floats = [operand for operand in operands if rng.random() < share]
        if floats and len(floats) < len(operands):
            both = BOTH_FLOAT_CLASSIFIER if name == "classifier" else BOTH_FLOAT
            floats = operands if rng.random() < both else []
        chosen += floats
    return chosen


def _activate(net: DynamicProxylessNASNets, subnet: Subnet, own: bool) -> int | None:
    """Run as this subnet. Returns its resolution if it has its `own`, not that of the batch."""
    net.activate(subnet)
    return subnet.resolution if own else None


def _partly_float(activate: Activate, floats: list[Quantizer]) -> int | None:
    """Activate a subnet with some of its operands in full precision, until the next one is activated."""
    side = activate()
    for operand in floats:
        operand.bits = FULL_PRECISION
    return side
