"""Search the bits of every layer of one trained network within a budget (HAQ, Wang et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from apq.files import Record
from apq.layers import FIXED_BITS, ConvLayer
from apq.model import ModelSpec
from apq.policy import NOT_QUANTIZED, QUANTIZERS, Policy, first_runs, layer_names
from apq.resume import NOT_KEPT, Resume
from elastic_nn.training.policies import PolicyScorer, ShortFinetune
from elastic_nn.training.pruned import weights_left
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.session import Session
from lut.bit_costs import BitCosts, linear_costs, weight_costs
from lut.cost_model import CostModel
from lut.traced import traced_layers
from methods.search.bit_choices import BitChoices, fixed_bits
from methods.search.bit_environment import BitEnvironment
from methods.search.episodes import find
from methods.search.settings import BitSearch, PolicySearch

REWARD_SCALE = 0.1  # reward of one percentage point of accuracy, as in HAQ


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trained float network, its layers as they run, their costs, and the cost model."""

    net: nn.Module
    spec: ModelSpec
    layers: list[ConvLayer]
    costs: BitCosts
    cost_model: CostModel

    @property
    def own_layers(self) -> list[ConvLayer]:
        """The layers that have bits of their own: the first run of each, in the order of `layer_names`."""
        return first_runs(self.layers)


def layers_of_model(net: nn.Module, spec: ModelSpec) -> list[ConvLayer]:
    """The layers of a network on an image of its resolution, in running order."""
    return traced_layers(net, spec.resolution, in_channels=spec.in_channels)


@dataclass(frozen=True, kw_only=True)
class FoundPolicy:
    """A policy of a network.

    Attributes:
        episode: what the policy's short finetune measured: "accuracy", "top5" and further facts. None for a given
            policy.
        history: records of the search that found it.
        original: top-1 (0 to 1) of the float network on the images that an episode is scored on.
    """

    policy: Policy
    episode: Record | None = None
    history: Sequence[Record] = ()
    original: float | None = None


def make_task(
    net: nn.Module, spec: ModelSpec, quantizer: str, quantity: str, cost_model: CostModel, *, is_pruned: bool = False
) -> Task:
    """List the layers of a network and price them. UserError if the cost model has no cost of `quantity` at 8 bits.

    Where weights alone are quantized, those of a pruned network that are zero have no size (HAQ).
    """
    layers = layers_of_model(net, spec)
    if QUANTIZERS[quantizer].weights_only:
        costs = weight_costs(layers, weights_left(net, layer_names(layers)) if is_pruned else None)
    else:
        costs = linear_costs(layers, quantity, cost_model)
    return Task(net=net, spec=spec, layers=layers, costs=costs, cost_model=cost_model)


def choices_of(task: Task, config: BitSearch) -> BitChoices:
    """The bits that may be chosen, and the budget. UserError names the lowest cost if the budget is below it."""
    activations = not QUANTIZERS[config.quantizer].weights_only
    costs = task.costs
    if activations and config.image_bits != FIXED_BITS:
        cells = costs.cells.copy()
        cells[0, :, FIXED_BITS - 1] = cells[0, :, config.image_bits - 1]  # the reference cost stays that of 8 bits
        costs = replace(costs, cells=cells)
    return BitChoices(
        layers=task.own_layers,
        costs=costs,
        budget=config.ratio * costs.reference if config.budget is None else config.budget,
        fixed=fixed_bits(len(task.own_layers), activations=activations, keep_ends=config.keep_ends),
        min_bit=config.min_bit,
        max_bit=config.max_bit,
    )


def environment_of(task: Task, config: BitSearch) -> BitEnvironment:
    """The environment of the agent, with the choices and errors of `choices_of`."""
    return BitEnvironment(**vars(choices_of(task, config)), every_operand=config.steps == "all")


def policy_of_bits(layers: Sequence[ConvLayer], quantizer: str, bits: np.ndarray) -> Policy:
    """The policy of a matrix of bits (layers, 2 or 1). The input of the first layer, the image, is not quantized."""
    rows = [tuple(row) for row in np.asarray(bits).tolist()]
    if not QUANTIZERS[quantizer].weights_only:
        rows[0] = (rows[0][0], NOT_QUANTIZED)
    return Policy(quantizer=quantizer, names=layer_names(layers), bits=tuple(rows))


def make_scorer(task: Task, config: BitSearch, train: TrainConfig, session: Session) -> PolicyScorer:
    """A scorer of policies, each after a finetune by `train`. The network of the task is quantized in place."""
    finetune = ShortFinetune(
        train=train,
        side=task.spec.resolution,
        train_images=config.train_images,
        val_images=config.val_images,
        reward=config.reward,
        metric=config.metric,
        keep_zeros=config.is_pruned,
    )
    return PolicyScorer(task.net, layer_names(task.layers), config.quantizer, finetune, session)


def search_bits(
    task: Task,
    config: PolicySearch,
    session: Session,
    resume: Resume = NOT_KEPT,
    log: Callable[[Record], None] = lambda record: None,
) -> FoundPolicy:
    """Search a policy with an agent.

    The network of the task is quantized in place, and left as the last episode trained it. The seed of the agent also
    draws the images that episodes train on. `log` is called with one record an episode.
    """
    bits = config.bits
    environment = environment_of(task, bits)
    scorer = make_scorer(task, bits, config.train, replace(session, seed=config.agent.seed))

    def score(candidate: np.ndarray, _: int) -> tuple[float, dict[str, float]]:
        found = scorer.accuracy(policy_of_bits(task.layers, bits.quantizer, candidate))
        gain = getattr(found, bits.metric) - getattr(scorer.original, bits.metric)
        facts = {"accuracy": found.top1, "top5": found.top5, "cost": environment.costs.total(candidate)}
        return REWARD_SCALE * 100 * gain, facts

    found = find(environment.observations(), environment.decide, score, config.agent, resume=resume, log=log)
    policy = policy_of_bits(task.layers, bits.quantizer, found.candidate)
    return FoundPolicy(policy=policy, episode=found.record, history=found.history, original=scorer.original.top1)
