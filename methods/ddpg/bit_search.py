"""Search the bits of every layer of one trained network within a budget (HAQ, Wang et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from apq.errors import UserError
from apq.layers import FIXED_BITS, ConvLayer
from apq.model import ModelSpec
from apq.policy import NOT_QUANTIZED, QUANTIZERS, Policy, layer_names
from dataset.splits import Splits
from elastic_nn.training.policies import PolicyScorer
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.session import ONE_PROCESS, Execution
from lut.costs import CostSource
from lut.traced import traced_layers
from methods.ddpg.agent import AgentConfig
from methods.ddpg.ddpg_finder import Found, find
from methods.ddpg.environment import BitEnvironment, fixed_bits
from utils.bit_costs import BitCosts, kmeans_costs, linear_costs, measured_costs

REWARD_SCALE = 0.1  # a point of accuracy, as in HAQ


@dataclass(frozen=True, kw_only=True)
class BitSearch:
    """What is searched: bits of `quantizer` from `min_bit` to `max_bit`, of cost at most `ratio` of the reference (the
    8-bit network's `quantity`; of k-means the bytes of the 32-bit weights), or at most `budget` if that is given.

    `keep_ends` leaves first and last layer at 8 bits. `image_bits` are those that the first layer's input is priced at:
    8, or 7, which the published HAQ reads by mistake. `train_images` and `val_images` are what an episode trains on and
    looks at.
    """

    quantizer: str
    quantity: str
    ratio: float
    min_bit: int
    max_bit: int
    keep_ends: bool
    train_images: int
    val_images: int
    budget: float | None = None
    image_bits: int = FIXED_BITS

    def __post_init__(self) -> None:
        fewest, most = QUANTIZERS[self.quantizer]
        if not fewest <= self.min_bit <= self.max_bit <= most:
            raise UserError(f"{self.quantizer} bits lie from {fewest} to {most}, not {self.min_bit} to {self.max_bit}")
        if not self.ratio > 0 or (self.budget is not None and not self.budget > 0):
            raise UserError(f"the budget must be positive, not {self.budget or self.ratio}")
        if self.quantizer == "kmeans" and self.quantity != "size":
            raise UserError("k-means weights are computed with in floating point: their budget is a size (--type size)")
        if self.train_images < 2 or self.val_images < 1:
            raise UserError("an episode needs at least two training images and one validation image")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trained float network, its layers as they run, what they cost, and the images."""

    net: nn.Module
    spec: ModelSpec
    layers: list[ConvLayer]
    costs: BitCosts
    splits: Splits

    @property
    def own_layers(self) -> list[ConvLayer]:
        """One layer a name, in the order of `layer_names`: those that have bits of their own."""
        first: dict[str, ConvLayer] = {}
        for layer in self.layers:
            first.setdefault(layer.name, layer)
        return list(first.values())


def make_task(
    net: nn.Module, spec: ModelSpec, splits: Splits, quantizer: str, quantity: str, source: CostSource | Path
) -> Task:
    """List the network's layers and price them, by a cost source or a file of measured costs in HAQ's form."""
    layers = traced_layers(net, spec.resolution, in_channels=spec.in_channels)
    if quantizer == "kmeans":
        costs = kmeans_costs(layers)
    elif isinstance(source, Path):
        costs = measured_costs(source, len(layer_names(layers)), "in the unit of its table")
    else:
        costs = linear_costs(layers, quantity, source)
    return Task(net=net, spec=spec, layers=layers, costs=costs, splits=splits)


def environment_of(task: Task, config: BitSearch) -> BitEnvironment:
    """Where the agent acts; UserError that names the cheapest cost if the budget is below it."""
    activations = config.quantizer == "linear"
    costs = task.costs
    if activations and config.image_bits != FIXED_BITS:
        cells = costs.cells.copy()
        cells[0, :, FIXED_BITS - 1] = cells[0, :, config.image_bits - 1]  # the reference stays that of 8 bits
        costs = replace(costs, cells=cells)
    return BitEnvironment(
        layers=task.own_layers,
        costs=costs,
        budget=config.ratio * costs.reference if config.budget is None else config.budget,
        fixed=fixed_bits(len(task.own_layers), activations=activations, keep_ends=config.keep_ends),
        min_bit=config.min_bit,
        max_bit=config.max_bit,
    )


def policy_of_bits(layers: Sequence[ConvLayer], quantizer: str, bits: np.ndarray) -> Policy:
    """The policy of a matrix of bits (layers, 2 or 1): the image stays as it is."""
    rows = [tuple(row) for row in np.asarray(bits).tolist()]
    if quantizer == "linear":
        rows[0] = (rows[0][0], NOT_QUANTIZED)
    return Policy(quantizer=quantizer, names=layer_names(layers), bits=tuple(rows))


def make_scorer(
    task: Task,
    config: BitSearch,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    execution: Execution = ONE_PROCESS,
) -> PolicyScorer:
    """What scores the policies of a search; it quantizes the task's network in place."""
    return PolicyScorer(
        task.net,
        layer_names(task.layers),
        config.quantizer,
        task.splits,
        recipe.pair_finetune,
        side=task.spec.resolution,
        train_images=config.train_images,
        val_images=config.val_images,
        seed=seed,
        device=device,
        execution=execution,
    )


def search_bits(
    task: Task,
    config: BitSearch,
    agent: AgentConfig,
    recipe: Recipe,
    *,
    device: torch.device,
    execution: Execution = ONE_PROCESS,
    **loop: Any,
) -> tuple[Policy, Found, float]:
    """The best policy that an agent met, its search, and the float network's own top-1 on the same validation images.

    The recipe's `pair_finetune` says how an episode trains. `loop` goes to `find`: state file, what was asked, log.
    The task's network is quantized in place, and left as the last episode made it.
    """
    environment = environment_of(task, config)
    scorer = make_scorer(task, config, recipe, seed=agent.seed, device=device, execution=execution)

    def score(bits: np.ndarray, _: int) -> tuple[float, dict[str, float]]:
        top1 = scorer.top1(policy_of_bits(task.layers, config.quantizer, bits))
        facts = {"accuracy": top1, "cost": environment.costs.total(bits)}
        return REWARD_SCALE * 100 * (top1 - scorer.original), facts

    found = find(environment.features(), environment.decide, score, agent, write=execution.main, **loop)
    return policy_of_bits(task.layers, config.quantizer, found.candidate), found, scorer.original
