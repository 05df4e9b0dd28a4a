"""The file of a network that was finetuned with a policy: weights, ranges or clusters, spec, policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from apq.checkpoint import check_fit, load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import Record
from apq.layers import ConvLayer
from apq.model import ModelSpec, model_from_dict, model_to_dict
from apq.policy import Policy, policy_from_dict, policy_to_dict
from apq.search_result import read_policy
from apq.skeleton import without_weights
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.named_models import build_model
from elastic_nn.networks.quantize_model import quantize_model, set_policy
from elastic_nn.quantizers import scheme_named


class PolicyModel(NamedTuple):
    """A quantized network with its spec and policy. `images` identifies its training images, if they are known."""

    net: nn.Module
    spec: ModelSpec
    policy: Policy
    layers: list[ConvLayer]
    images: Record | None


def save_policy_model(
    path: Path,
    spec: ModelSpec,
    policy: Policy,
    layers: list[ConvLayer],
    signed: Mapping[str, bool],
    state: Mapping[str, Tensor],
    **facts: Any,
) -> None:
    """Write a quantized network with all that rebuilding it needs, and facts about its training.

    `signed` says for each layer whether its input may be negative.
    """
    described = {"model": model_to_dict(spec), "quantization": policy_to_dict(policy, layers), "signed": dict(signed)}
    save_checkpoint(path, {**described, "state_dict": dict(state), **facts})


def load_policy_model(path: Path) -> PolicyModel:
    """Load the network of a file. UserError where it holds no such network, or where its parts do not fit together."""
    data = load_checkpoint(path, ("model", "quantization", "signed", "state_dict"))
    try:
        spec = model_from_dict(data["model"])
        policy, layers = policy_from_dict(data["quantization"])
        signed, state = data["signed"], data["state_dict"]
        _check_layers(spec, state)
        net = build_model(spec)
        if not isinstance(signed, Mapping) or set(signed) != set(policy.names):
            raise UserError("its signs of inputs are not those of its layers")
        if unknown := set(policy.names) - {name for name, _ in net.named_modules()}:
            raise UserError(f"its policy has layers that the network lacks, such as {min(unknown)}")
        shape = spec.in_channels, spec.resolution, spec.resolution
        quantize_model(net, policy.names, scheme_named(policy.quantizer), signed, shape)
        set_policy(net, policy)
        _check_state(net, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    net.load_state_dict(state)
    return PolicyModel(net, spec, policy, layers, data.get("images"))


def load_finetuned_policy(experiment: Experiment) -> PolicyModel:
    """Load the finetuned network of an experiment. UserError unless its policy is that of `policy.json`."""
    found = load_policy_model(experiment.best_checkpoint)
    if (found.policy, found.layers) != read_policy(experiment):
        raise UserError(f"{experiment.policy} is not the policy of {experiment.best_checkpoint}; finetune it again")
    return found


def _check_layers(spec: ModelSpec, state: Any) -> None:
    """UserError unless the weights have those of the float network, before memory is taken for it."""
    if not isinstance(state, Mapping):
        raise UserError("it has no weights")
    with without_weights():
        own = build_model(spec).state_dict()
    check_fit({key: value for key, value in state.items() if key in own}, own)


def _check_state(net: nn.Module, state: Mapping[str, Any]) -> None:
    """UserError unless the weights fit. Quantizers check their own data-dependent tensors, such as clusters."""
    operands = [
        (f"{name}.{kind}.", quantizer, layer.weight.shape if kind == "weight_quant" else None)
        for name, layer in quantized_layers(net).items()
        for kind, quantizer in layer.operands().items()
    ]
    of_data = {prefix + key for prefix, quantizer, _ in operands for key in quantizer.data_dependent}
    own = {path: tensor for path, tensor in net.state_dict().items() if path not in of_data}
    check_fit({path: value for path, value in state.items() if path not in of_data}, own)
    for prefix, quantizer, shape in operands:
        found = {key: state[prefix + key] for key in quantizer.data_dependent if prefix + key in state}
        quantizer.check_state(found, shape)
