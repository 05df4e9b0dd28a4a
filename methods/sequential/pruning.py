"""Second stage of the sequential baseline: an agent prunes the channels of a trained float subnet.

AMC (He et al., ECCV 2018, arXiv 1802.03494): a candidate keeps the channels of largest L1 norm of the trained network,
and is scored without a finetune.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from apq.errors import UserError
from apq.files import Record
from apq.resume import NOT_KEPT, Resume
from apq.skeleton import without_weights
from apq.space import SearchSpace
from apq.subnet import Subnet
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.subnet import build_subnet
from elastic_nn.quantizers import FLOAT
from elastic_nn.training.batchnorm import recalibrate, recalibration_batches
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate
from elastic_nn.training.session import Session
from lut.cost_model import CostModel
from methods.search.bit_search import REWARD_SCALE
from methods.search.episodes import Found, find
from methods.search.observations import with_last_action
from methods.sequential.config import WidthSearch
from methods.sequential.widths import width_environment, widths_of, with_widths


@dataclass(frozen=True, kw_only=True)
class FloatSubnet:
    """A trained float network, and its subnet of a space."""

    net: MBConvNet
    space: SearchSpace
    subnet: Subnet


@torch.no_grad()
def prune_channels(whole: FloatSubnet, mid_channels: np.ndarray) -> FloatSubnet:
    """A copy with these mid channels (blocks,).

    Each block keeps the channels whose projection weights have the largest L1 norm, in their order. UserError for
    channels that the space does not have, or that are more than the present ones.
    """
    net, space, subnet, mid_channels = whole.net, whole.space, whole.subnet, np.asarray(mid_channels)
    if (mid_channels > (present := widths_of(space, subnet))).any():
        raise UserError(f"channels can only be pruned: {present.tolist()} cannot become {mid_channels.tolist()}")
    pruned_subnet = with_widths(space, subnet, mid_channels)
    state = net.state_dict()
    for i, mid in enumerate(mid_channels.tolist(), start=1):
        norms = net.blocks[i].project.conv.weight.abs().sum((0, 2, 3))  # (mid,)
        kept = norms.argsort(descending=True, stable=True)[:mid].sort().values
        for role, unit in net.blocks[i].layers().items():
            for key, tensor in unit.state_dict().items():
                if role == "project":
                    cut = tensor[:, kept] if key == "conv.weight" else tensor
                else:
                    cut = tensor[kept] if tensor.ndim else tensor  # BatchNorm counts its batches in a scalar
                state[f"blocks.{i}.{role}.{key}"] = cut
    with without_weights():  # every tensor is copied below
        pruned = build_subnet(space, pruned_subnet, FLOAT)
    like = next(net.parameters())
    pruned = pruned.to(like.dtype).to_empty(device=like.device)
    pruned.load_state_dict(state)
    for ours, theirs in zip(pruned.modules(), net.modules(), strict=True):
        if isinstance(ours, torch.nn.BatchNorm2d):
            ours.momentum, ours.eps = theirs.momentum, theirs.eps
    pruned.dropout.p = net.dropout.p
    return FloatSubnet(net=pruned.train(net.training), space=space, subnet=pruned_subnet)


def widest_network(whole: FloatSubnet, cost_model: CostModel, config: WidthSearch) -> FloatSubnet:
    """The network that keeps as many channels as the budget allows. UserError if none is within it."""
    space, subnet = whole.space, whole.subnet
    environment = width_environment(space, subnet, config.quantity, cost_model, config.budget)
    return prune_channels(whole, environment.decide(np.ones(len(subnet.running_slots(space)))))


def search_widths(
    whole: FloatSubnet,
    cost_model: CostModel,
    config: WidthSearch,
    session: Session,
    resume: Resume = NOT_KEPT,
    log: Callable[[Record], None] = lambda record: None,
) -> tuple[FloatSubnet, Found, float]:
    """Prune a trained subnet to the best mid channels that an agent finds. The given network does not change.

    Returns the pruned network as it was scored, the search, and the top-1 of the given network on the same validation
    images. `log` is called with one record an episode.
    """
    space, subnet, device, execution = whole.space, whole.subnet, session.device, session.execution
    net = whole.net.to(device)
    environment = width_environment(space, subnet, config.quantity, cost_model, config.budget)
    sides = (subnet.resolution,)
    val = session.loader(session.splits.val.thinned(config.val_images), EVALUATION_BATCH, sides=sides)
    calibration = recalibration_batches(session.splits, sides, device, config.recalibration_images)
    original = evaluate(net, val, device, execution=execution).top1

    # Episodes need no copies: with the best channels first, elastic layers run any width as a slice.
    sorted_net = copy.deepcopy(net)
    for block in sorted_net.blocks[1:]:
        block.sort_channels()
    slots = subnet.running_slots(space)

    def score(mid_channels: np.ndarray, _: int) -> tuple[float, dict[str, float]]:
        for block, slot, mid in zip(sorted_net.blocks[1:], slots, mid_channels.tolist(), strict=True):
            block.set_shape(subnet.ks[slot.index], mid)
        recalibrate(sorted_net, calibration, device, config.recalibration_images)
        top1 = evaluate(sorted_net, val, device, execution=execution).top1
        facts = {"accuracy": top1, "cost": environment.cost_of_widths(mid_channels)}
        return REWARD_SCALE * 100 * (top1 - original), facts

    found = find(
        with_last_action(environment.features()), environment.decide, score, config.agent, resume=resume, log=log
    )
    pruned = prune_channels(whole, found.candidate)
    recalibrate(pruned.net, calibration, device, config.recalibration_images)
    return pruned, found, original
