"""What `benchmarks/evidence.py` compares methods on: the space, its budgets, sizes of all trainings, as data.

All methods of a comparison have the same space, images, budgets, short finetune (of a subnet or policy that a search
measures) and final finetune. The two settings are the fashion space, and one that shows in seconds that all runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from apq.files import Record
from apq.genes import canonical, cardinalities, subnets_of, with_highest_bits
from apq.model import subnet_model
from apq.policy import LINEAR
from apq.presets import DIGITS, FASHION
from apq.space import SearchSpace, space_to_dict
from apq.stages import Stage
from apq.subnet import Subnet
from elastic_nn.networks.supernet_file import build_supernet
from elastic_nn.quantizers import FLOAT
from elastic_nn.training.apq_recipes import FASHION_RECIPE, TINY_RECIPE
from elastic_nn.training.recipe import Recipe, TrainConfig
from lut.bitfusion import BitFusion
from methods.search.bit_search import choices_of, make_task
from methods.search.evolution_finder import EvolutionConfig
from methods.search.settings import AgentConfig, BitSearch

COST_MODEL, SCOPE = BitFusion(), "full"  # the published accelerator, all layers
QUANTITIES = ("latency", "energy")
SLACK = 1.05  # of the tightest budget over the cheapest bits of the fixed network
DIGITS_OF_BUDGETS = 4  # budgets are rounded, so that they are the same numbers on all machines
MOST = 1e9  # a budget that limits nothing


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All numbers that the runs of questions 1 to 3 depend on.

    Attributes:
        recipe: its phases train the supernet, `pair_finetune` is the short finetune on `pair_epoch_images`, `finetune`
            the final one.
        val_images: validation images, always the same, that everything is scored on but the final network.
        final_images: training images, always the same, of an epoch of the final finetune, and of the float finetunes
            of the fixed network and of the sequential method, which have one epoch.
        n_float, n_quant, holdout: pairs of each kind, and the fraction of the quantized ones that is held out.
        sizes: numbers of quantized pairs that predictors are trained on.
        n_joint: how many of the pairs one-shot joint search has.
        n_budgets: budgets of each quantity.
        agent: of the agents that choose bits, each for every budget.
        pruning_episodes, pruning_images: of the sequential method's other agent, whose episodes do not train.
        loss_images: training images that sensitivities are measured on.
    """

    name: str
    space: SearchSpace
    recipe: Recipe
    evolution: EvolutionConfig
    agent: AgentConfig
    val_images: int
    final_images: int
    n_float: int
    n_quant: int
    sizes: tuple[int, ...]
    n_joint: int
    pruning_episodes: int
    pruning_images: int
    loss_images: int
    holdout: float = 0.2
    n_budgets: int = 4

    def digest(self) -> str:
        """A hash of all numbers: lines of other settings are not mixed with these.

        Fields at their defaults are left out, so that recipes may have new ones.
        """
        plain = {**_told(replace(self, space=None)), "space": space_to_dict(self.space)}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]

    def bit_search(self, quantity: str, limit: float) -> BitSearch:
        """The bits that may be chosen for the fixed network: 2 to 8 of each operand, 8 in the first and last layer."""
        choices = self.bit_choices
        return BitSearch(
            quantizer=LINEAR,
            quantity=quantity,
            ratio=1.0,  # no effect, because there is a budget
            budget=limit,
            min_bit=choices[0],
            max_bit=choices[-1],
            keep_ends=True,
            train_images=self.recipe.pair_epoch_images,
            val_images=self.val_images,
        )

    @property
    def bit_choices(self) -> list[int]:
        """All bits that an operand of the space may have."""
        return sorted({bits for kind in self.space.operands for bits in kind.choices})

    def record(self) -> Record:
        """What a line says of the setting."""
        return {"name": self.name, "digest": self.digest()}


def middle_subnet(space: SearchSpace) -> Subnet:
    """The architecture of middle kernels, depths and mid channels, of two middles the larger, at the highest bits."""
    middle = with_highest_bits(space, (cardinalities(space) // 2)[None])
    return subnets_of(space, canonical(space, middle))[0]


def budgets_of(setting: Setting, quantity: str) -> list[float]:
    """Budgets from tight to loose, evenly spaced in the logarithm, in the unit of the quantity; a single one is loose.

    The tightest is `SLACK` times the cost of the fixed network at its cheapest bits, the loosest its cost at the most
    bits everywhere. The cheapest bits are not the fewest: on the published accelerator, small depthwise layers are
    slower at 2 bits than at 3.
    """
    supernet = build_supernet(setting.space, FLOAT)
    subnet = middle_subnet(setting.space)
    supernet.activate(subnet)
    spec = subnet_model(setting.space, subnet)
    task = make_task(supernet.get_active_subnet(), spec, LINEAR, quantity, COST_MODEL)
    choices = choices_of(task, setting.bit_search(quantity, MOST))
    low, high = SLACK * task.costs.total(choices.cheapest()), task.costs.reference
    return [float(f"{limit:.{DIGITS_OF_BUDGETS}g}") for limit in np.geomspace(high, low, setting.n_budgets)[::-1]]


def _told(value: Any) -> Any:
    """A dataclass as plain data without the fields that are at their defaults."""
    if isinstance(value, (list, tuple)):
        return [_told(one) for one in value]
    if not is_dataclass(value):
        return value
    told = {one.name: (getattr(value, one.name), one.default) for one in fields(value)}
    return {name: _told(own) for name, (own, default) in told.items() if own != default}


def _shortened(recipe: Recipe, epochs: tuple[int, ...], epoch_images: int) -> Recipe:
    phases = (
        replace(phase, train=replace(phase.train, epochs=n), epoch_images=epoch_images)
        for phase, n in zip(recipe.phases, epochs, strict=True)
    )
    return replace(recipe, phases=tuple(phases))


# Sized for an hour a seed on one core. Of the images an epoch of the supernet has a quarter.
FASHION_SETTING = Setting(
    name="fashion",
    space=FASHION,
    recipe=replace(
        _shortened(FASHION_RECIPE, (8, 2, 2, 5), 13_500),
        pair_epoch_images=1000,
        recalibration_images=512,
        finetune=TrainConfig(epochs=3, lr=0.02, label_smoothing=0.0),
    ),
    evolution=EvolutionConfig(),
    agent=AgentConfig(episodes=32, warmup=12),
    val_images=3000,
    final_images=4000,
    n_float=300,
    n_quant=500,
    sizes=(50, 100, 200, 400),
    n_joint=200,
    pruning_episodes=50,
    pruning_images=256,
    loss_images=1024,
)
TINY_SPACE = replace(
    DIGITS,
    name="tiny",
    stages=(Stage(width=8, stride=2, depths=(1, 2)), Stage(width=16, stride=2, depths=(1,))),
    kernel_sizes=(3, 5),
    ratios=(1.0, 2.0),
    operands=tuple(replace(kind, choices=(4, 8)) for kind in DIGITS.operands),
    forbidden=(),
    recipe="tiny",
)
TINY_SETTING = Setting(
    name="tiny",
    space=TINY_SPACE,
    recipe=replace(_shortened(TINY_RECIPE, (1, 1, 1, 1), 64), pair_epoch_images=32, recalibration_images=32),
    evolution=EvolutionConfig(population=10, generations=2),
    agent=AgentConfig(episodes=2, warmup=1),
    val_images=32,
    final_images=32,
    n_float=12,
    n_quant=20,
    sizes=(16,),
    n_joint=16,
    pruning_episodes=2,
    pruning_images=32,
    loss_images=32,
    n_budgets=1,
)
