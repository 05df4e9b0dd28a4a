"""Search the bits of every layer of one trained network within a budget (HAQ, Wang et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from apq.layers import FIXED_BITS, ConvLayer
from apq.model import ModelSpec
from apq.policy import NOT_QUANTIZED, Policy, layer_names
from dataset.splits import Splits
from elastic_nn.training.policies import PolicyScorer
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.session import ONE_PROCESS, Execution
from lut.bit_costs import BitCosts, kmeans_costs, linear_costs, measured_costs
from lut.cost_model import CostModel
from lut.measured import MeasuredTable
from lut.traced import traced_layers
from methods.search.bit_environment import BitEnvironment, fixed_bits
from methods.search.episodes import Found, find
from methods.search.settings import AgentConfig, BitSearch

REWARD_SCALE = 0.1  # a point of accuracy, as in HAQ


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


def layers_of_model(net: nn.Module, spec: ModelSpec) -> list[ConvLayer]:
    """The layers of a network on an image of its resolution, in running order."""
    return traced_layers(net, spec.resolution, in_channels=spec.in_channels)


def make_task(
    net: nn.Module, spec: ModelSpec, splits: Splits, quantizer: str, quantity: str, cost_model: CostModel
) -> Task:
    """List the network's layers and price them. A measured table, whatever its quantity, prices the layers it has."""
    layers = layers_of_model(net, spec)
    if quantizer == "kmeans":
        costs = kmeans_costs(layers)
    elif isinstance(cost_model, MeasuredTable):
        costs = measured_costs(cost_model)
    else:
        costs = linear_costs(layers, quantity, cost_model)
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
