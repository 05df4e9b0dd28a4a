"""Second stage of the sequential baseline: an agent prunes the channels of a trained float subnet (AMC).

He et al., ECCV 2018, arXiv 1802.03494: each candidate is cut out of the trained network, which keeps the input channels
of largest L1 norm, and is scored without any finetune.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from apq.errors import UserError
from apq.space import SearchSpace
from apq.subnet import Subnet
from dataset.splits import Splits, make_loader
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.subnet import build_subnet
from elastic_nn.quantizers import FLOAT
from elastic_nn.training.batchnorm import RECALIBRATION_BATCH, recalibrate
from elastic_nn.training.engine import EVALUATION_BATCH, ONE_PROCESS, Execution, evaluate
from lut.costs import CostSource
from methods.ddpg.agent import AgentConfig
from methods.ddpg.bit_search import REWARD_SCALE
from methods.ddpg.ddpg_finder import Found, find
from methods.sequential.widths import width_environment, widths_of, with_widths


@dataclass(frozen=True, kw_only=True)
class WidthSearch:
    """What is searched: widths of cost at most `budget` in the unit of `quantity`, one of UNITS.

    An episode recalibrates BatchNorm on `recalibration_images` and looks at `val_images`.
    """

    quantity: str
    budget: float
    recalibration_images: int
    val_images: int

    def __post_init__(self) -> None:
        if min(self.recalibration_images, self.val_images) < 1:
            raise UserError("an episode needs images to recalibrate on and validation images")


@torch.no_grad()
def prune_channels(
    net: MBConvNet, space: SearchSpace, subnet: Subnet, mid_channels: np.ndarray
) -> tuple[MBConvNet, Subnet]:
    """The float network of a subnet with fewer channels (blocks,) after expansion: a copy, and its subnet.

    Each block keeps the channels whose projection weights have the largest L1 norm, in their old order. UserError for
    widths that the space does not have or that are above the present ones.
    """
    mid_channels = np.asarray(mid_channels)
    if (mid_channels > (present := widths_of(space, subnet))).any():
        raise UserError(f"channels can only be pruned: {mid_channels.tolist()} are asked of {present.tolist()}")
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
    with torch.device("meta"):  # every tensor is copied below: none need be drawn first
        pruned = build_subnet(space, pruned_subnet, FLOAT)
    like = next(net.parameters())
    pruned = pruned.to(like.dtype).to_empty(device=like.device)
    pruned.load_state_dict(state)
    for ours, theirs in zip(pruned.modules(), net.modules(), strict=True):
        if isinstance(ours, torch.nn.BatchNorm2d):
            ours.momentum, ours.eps = theirs.momentum, theirs.eps
    pruned.dropout.p = net.dropout.p
    return pruned.train(net.training), pruned_subnet


def search_widths(
    net: MBConvNet,
    space: SearchSpace,
    subnet: Subnet,
    splits: Splits,
    source: CostSource,
    config: WidthSearch,
    agent: AgentConfig,
    *,
    device: torch.device,
    execution: Execution = ONE_PROCESS,
    **loop: Any,
) -> tuple[MBConvNet, Subnet, Found, float]:
    """Prune a trained float subnet as the best episode of an agent did.

    Returns the pruned network as it was scored, its subnet, the search, and the whole network's own top-1 on the same
    validation images. `loop` goes to `find`: state file, what was asked, log. The network itself stays as it is.
    """
    net = net.to(device)
    environment = width_environment(space, subnet, config.quantity, source, config.budget)
    sides = (subnet.resolution,)
    val = make_loader(
        splits.val.thinned(config.val_images),
        EVALUATION_BATCH,
        rank=execution.rank,
        world_size=execution.world_size,
        sides=sides,
    )
    calibration = make_loader(splits.calibration, RECALIBRATION_BATCH, sides=sides)
    original = evaluate(net, val, device, execution=execution).top1

    # Episodes cut nothing out: with the best channels in front, the elastic layers run any width as a slice.
    sorted_net = copy.deepcopy(net)
    for block in sorted_net.blocks[1:]:
        block.sort_channels()

    def score(mid_channels: np.ndarray, _: int) -> tuple[float, dict[str, float]]:
        for block, slot, mid in zip(
            sorted_net.blocks[1:], subnet.running_slots(space), mid_channels.tolist(), strict=True
        ):
            block.set_shape(subnet.ks[slot.index], mid)
        recalibrate(sorted_net, calibration, device, config.recalibration_images)
        top1 = evaluate(sorted_net, val, device, execution=execution).top1
        facts = {"accuracy": top1, "cost": environment.cost_of_widths(mid_channels)}
        return REWARD_SCALE * 100 * (top1 - original), facts

    found = find(environment.features(), environment.decide, score, agent, write=execution.main, **loop)
    pruned, pruned_subnet = prune_channels(net, space, subnet, found.candidate)
    recalibrate(pruned, calibration, device, config.recalibration_images)
    return pruned, pruned_subnet, found, original
