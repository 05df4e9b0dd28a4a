"""Networks by name: torchvision's classification models, experiments, the largest and smallest subnet of a space."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from apq.errors import UserError
from apq.experiment import Experiment
from apq.layers import FIXED_BITS, ConvLayer, layers_of
from apq.own_networks import LITES, OWN_NETWORKS, SMALL, SMALL_SIDE, layers_of_own
from apq.policy import QUANTIZERS, priced_layers
from apq.presets import SPACES, get_space
from apq.search_result import PolicyChoice, read_result
from apq.space import SCOPES, SHARED_SETTING, SearchSpace
from apq.subnet import Subnet, subnet_from_spec

ENDS = {"smallest": 0, "largest": -1}  # index into every tuple of choices
TORCHVISION_RESOLUTION = 224
# Channels, classes and side of the images of own networks, which are glyphs where they are small, else ImageNet.
IMAGES_OF_OWN = {True: (1, 62, SMALL_SIDE), False: (3, 1000, TORCHVISION_RESOLUTION)}


@dataclass(frozen=True, kw_only=True)
class NamedNetwork:
    """The layers of a network, for each scope that it has.

    `unlisted_params` is the number of parameters outside these layers, for example of a norm that cannot be folded or
    of a branch that runs in training only. `experiment` is the search that found the network.
    """

    title: str
    resolution: int
    layers: dict[str, list[ConvLayer]]
    unlisted_params: int = 0
    experiment: Experiment | None = None


def network_named(name: str, bits: tuple[int, int] | None = None, resolution: int | None = None) -> NamedNetwork:
    """Look up a network: a torchvision model, one of our own, an experiment's folder, `SPACE:largest` or `:smallest`.

    `bits` are those of weights and activations, for every layer of a torchvision model (default: 8) or for the searched
    layers of a space (default: the highest). An experiment has its own bits. UserError for an unknown network.
    """
    if "/" in name and ":" not in name:
        return _experiment(Experiment(Path(name)), bits, resolution)
    space_name, colon, end = name.rpartition(":")
    if colon:
        return _end_of_space(get_space(space_name), end, bits, resolution)
    if name in SPACES or name.endswith(".json"):
        raise UserError(f"{name} is a space: name one of its subnets, {name}:largest or {name}:smallest")
    bits = bits or (FIXED_BITS, FIXED_BITS)
    if name in OWN_NETWORKS:
        return _own(name, bits, resolution)
    return _torchvision(name, bits, resolution or TORCHVISION_RESOLUTION)


def _experiment(experiment: Experiment, bits: tuple[int, int] | None, resolution: int | None) -> NamedNetwork:
    if bits is not None:
        raise UserError(f"{experiment.path} has its own bits, found by the search: leave --bits out")
    choice = read_result(experiment).choice
    if isinstance(choice, PolicyChoice):
        return _of_policy(experiment, choice, resolution)
    title = f"{experiment.path}: found in space {choice.space.name}"
    return replace(_of_space(title, choice.space, choice.subnet, resolution), experiment=experiment)


def _of_policy(experiment: Experiment, choice: PolicyChoice, resolution: int | None) -> NamedNetwork:
    policy, layers = choice.policy, choice.layers
    if not QUANTIZERS[policy.quantizer].priced:
        raise UserError(
            f"{experiment.path}: {policy.quantizer} weights compute in floating point, which has no cost model here"
        )
    if resolution not in (None, layers[0].input_size):
        raise UserError(f"{experiment.path} is for {layers[0].input_size} pixels: leave --resolution out")
    return NamedNetwork(
        title=f"{experiment.path}: {policy.quantizer} policy of {choice.model}",
        resolution=layers[0].input_size,
        layers={"full": priced_layers(layers, policy, choice.image_bits)},
        experiment=experiment,
    )


def _end_of_space(space: SearchSpace, end: str, bits: tuple[int, int] | None, resolution: int | None) -> NamedNetwork:
    if end not in ENDS:
        raise UserError(f"space {space.name} has no subnet {end!r} by name; known: {', '.join(ENDS)}")
    i, n = ENDS[end], len(space.slots)
    given = dict(zip("wa", bits, strict=True)) if bits else {}
    shared_bits = [given.get(shared.operand, shared.choices[-1]) for shared in space.shared_operands]
    subnet = subnet_from_spec(
        space,
        {
            "ks": [space.kernel_sizes[i]] * n,
            "e": [slot.ratios[i] for slot in space.slots],
            "d": [stage.depths[i] for stage in space.stages],
            "resolution": space.resolutions[i],
            **{kind.setting: [given.get(kind.operand, kind.choices[-1])] * n for kind in space.operands},
            **({SHARED_SETTING: shared_bits} if shared_bits else {}),
        },
    )
    shown = "its highest bits" if bits is None else f"W{bits[0]}A{bits[1]}"
    return _of_space(f"{end} network of space {space.name}, searched layers at {shown}", space, subnet, resolution)


def _of_space(title: str, space: SearchSpace, subnet: Subnet, resolution: int | None) -> NamedNetwork:
    subnet = replace(subnet, resolution=resolution or subnet.resolution)  # costs need no choice of the space
    layers = {scope: layers_of(space, subnet, scope) for scope in SCOPES}
    return NamedNetwork(title=title, resolution=subnet.resolution, layers=layers)


def _own(name: str, bits: tuple[int, int], resolution: int | None) -> NamedNetwork:
    """One of the toolkit's own networks, for the images that `train.py --model` trains it on by default."""
    channels, n_classes, side = IMAGES_OF_OWN[name in SMALL]
    side = resolution or (LITES[name].side if name in LITES else side)
    return NamedNetwork(
        title=f"{name} for {n_classes} classes, every layer W{bits[0]}A{bits[1]}",
        resolution=side,
        layers={"full": layers_of_own(name, bits, side, channels, n_classes)},
    )


def _torchvision(name: str, bits: tuple[int, int], resolution: int) -> NamedNetwork:
    import torchvision  # slow, and needed for these names only

    from lut.traced import EmptyWeights, traced_layers

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *OWN_NETWORKS], n=5)
        nearest = f"nearest: {', '.join(near)}; or give" if near else "give"
        raise UserError(
            f"unknown model {name!r}; {nearest} a classification model of torchvision, {', '.join(OWN_NETWORKS)}, the "
            "folder of an experiment (exps/NAME), SPACE:largest or SPACE:smallest"
        )
    with warnings.catch_warnings(), EmptyWeights():
        warnings.simplefilter("ignore")  # they concern initial values, which are not used
        net = torchvision.models.get_model(name, weights=None)
    layers = traced_layers(net.to("meta"), resolution, w_bits=bits[0], a_bits=bits[1])
    return NamedNetwork(
        title=f"{name} of torchvision, every layer W{bits[0]}A{bits[1]}",
        resolution=resolution,
        layers={"full": layers},
        unlisted_params=sum(p.numel() for p in net.parameters()) - sum(layer.params for layer in layers),
    )
