"""The start of a supernet's training: from scratch, from a float supernet, or from one of more bits (OQA, arXiv
2010.04354)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from apq.bit_widths import bits_throughout, same_architectures
from apq.errors import UserError
from apq.genes import largest_subnet
from apq.space import SearchSpace
from dataset.splits import Splits
from elastic_nn.modules.quant_layers import quantizers
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import build_supernet
from elastic_nn.quantizers import QuantScheme
from elastic_nn.training.batchnorm import recalibrate, recalibration_batches
from elastic_nn.training.finetune import calibrate
from elastic_nn.training.recipe import Recipe


def check_recipe(recipe: Recipe, scheme: QuantScheme, *, from_scratch: bool) -> None:
    """UserError unless the recipe can train a supernet with these quantizers."""
    if from_scratch and recipe.phases[0].sandwich:
        raise UserError(f"recipe {recipe.name} trains all sizes at once from the start: give a supernet to start from")
    if not scheme.mixed_precision and any(phase.float_share for phase in recipe.phases):
        raise UserError(f"recipe {recipe.name} mixes full precision with bits: {scheme.name} quantizers cannot")
    if scheme.mixed_precision and not any("bits" in phase.elastic for phase in recipe.phases):
        raise UserError(f"recipe {recipe.name} never varies the bits, which a supernet of mixed precision needs")


def check_scheme(space: SearchSpace, scheme: QuantScheme) -> None:
    """UserError unless supernets of this space can be trained with these quantizers."""
    if not scheme.trains_supernets:
        raise UserError(
            f"supernets are not trained with {scheme.name} quantizers, but with float, lsq or mixed-precision ones"
        )
    if scheme.learned_steps and bits_throughout(space) is None:
        raise UserError(f"a supernet with learned steps has one bit-width throughout; space {space.name} has several")


def check_start(start: DynamicProxylessNASNets | None, space: SearchSpace, scheme: QuantScheme) -> None:
    """UserError unless a supernet of this space and scheme can be trained, from `start` if it is given."""
    check_scheme(space, scheme)
    if scheme.mixed_precision and (start is None or start.scheme.quantizes):
        raise UserError(
            f"a supernet of mixed precision ({scheme.name}) starts from a float one, its teacher: train that with "
            "--quantizer float, then give it with --start_from"
        )
    if start is None:
        return
    if not same_architectures(start.space, space):
        raise UserError(f"the supernet to start from is of space {start.space.name}, which has other architectures")
    if not start.scheme.quantizes:
        return
    if start.scheme != scheme:
        raise UserError(f"a {scheme.name} supernet cannot start from a quantized one ({start.scheme.name})")
    given, asked = start.space.fixed_bits, space.fixed_bits
    if given < asked:
        raise UserError(f"the supernet to start from has {given} bits: {asked} bits cannot inherit from fewer")
    if not all(quantizer.started for quantizer in quantizers(start)):
        raise UserError("the supernet to start from has steps that were never trained")


def first_supernet(
    space: SearchSpace,
    scheme: QuantScheme,
    start: DynamicProxylessNASNets | None,
    splits: Splits,
    n_images: int,
    device: torch.device,
) -> DynamicProxylessNASNets:
    """The supernet before its first training step, equal in all processes.

    A float `start` passes on its weights, one of more bits also its steps, doubled for each bit less. Other steps are
    calibrated with the largest subnet, which runs all layers, in mixed precision at each kernel size. BatchNorm is
    recalibrated at the new bits.
    """
    net = build_supernet(space, scheme)
    if start is not None and not start.scheme.quantizes and scheme.quantizes:
        net.load_float_weights(start.state_dict())
    elif start is not None:
        net.load_state_dict(start.state_dict())
        for quantizer in quantizers(net):
            quantizer.inherit(start.space.fixed_bits, space.fixed_bits)
    net.to(device)
    if scheme.quantizes:
        calibrate(net, splits, space.resolutions[-1], n_images, device, _subnets_to_calibrate(net))
    return net


def _subnets_to_calibrate(net: DynamicProxylessNASNets) -> list[Callable[[], None]]:
    """Activate subnets that together run all quantizers: the largest, in mixed precision with each kernel size."""
    largest, sizes = largest_subnet(net.space), net.space.kernel_sizes
    sizes = sizes if net.scheme.mixed_precision else sizes[-1:]
    return [partial(net.activate, replace(largest, ks=(kernel,) * len(largest.ks))) for kernel in sizes]


def frozen_largest(net: DynamicProxylessNASNets, device: torch.device) -> nn.Module:
    """A frozen copy of the largest subnet, the teacher of the others."""
    net.activate(largest_subnet(net.space))
    return net.get_active_subnet().to(device).eval().requires_grad_(False)


def first_teacher(start: DynamicProxylessNASNets, splits: Splits, n_images: int, device: torch.device) -> nn.Module:
    """The frozen largest subnet of a trained supernet, recalibrated on images of all resolutions."""
    teacher = frozen_largest(start, device)
    batches = recalibration_batches(splits, start.space.resolutions, device, n_images)
    recalibrate(teacher, batches, device, n_images)
    return teacher
