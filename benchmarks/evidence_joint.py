"""Does joint search pay? Architecture and bits at once, against one after the other, against a fixed architecture.

  joint        evolution by a kernel regression of 200 quantized pairs, one-shot: what it finds is not measured
  refined      the same with 120 pairs and 10 subnets measured a budget in two rounds (search.py --refine)
  sequential   architecture by the float predictor, channels by an agent, bits by another (search.py --mode sequential)
  float-nas    for each uniform pair of the space's bits the best architecture within the budget by the float
               predictor; the short finetune picks the pair
  agent        HAQ's agent chooses the bits of the fixed network: of middle kernels, depths and mid channels

Every method ends with the same final finetune. What the searches cost is counted in measured subnets, a short finetune
and a score each. The 200 of the joint method are shared by all eight budgets, 25 a budget. The agents of the other
methods have 32 for every budget, so more than the joint method. The sequential method's agent of channels has episodes
that do not train beside them, and a float finetune. All but the agent share 300 float pairs, which are scored but not
trained. The joint method chooses among the bits of the space, 2, 4 and 8, the agents among 2 to 8.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
from torch import nn

from apq.errors import UserError
from apq.files import Record
from apq.genes import genes_of
from apq.space import SearchSpace
from apq.subnet import Subnet, architecture_of, policy_of, subnet_from_spec
from benchmarks import evidence_bits
from benchmarks.evidence_ground import FLOAT_EPOCHS, Ground, NoResult, SearchCost
from benchmarks.evidence_lines import Question, Run
from benchmarks.evidence_pairs import trained
from benchmarks.evidence_refined import refined_subnet, search_cost
from benchmarks.evidence_setting import COST_MODEL, QUANTITIES, SCOPE, Setting, budgets_of
from elastic_nn.training.engine import seed_epoch
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.policies import quantized_model
from lut.population import PopulationCost
from methods.search.evolution_finder import EvolutionFinder
from methods.sequential.architecture import in_full_space, subnet_cost
from methods.sequential.config import SequentialConfig, Split
from methods.sequential.pipeline import Parts, run_sequential

PRUNE_RATIO = 0.75


def runs(setting: Setting, seed: int) -> list[Run]:
    """The runs of a seed."""
    return [
        Run(question="joint", seed=seed, method=method, quantity=quantity, limit=limit)
        for quantity in QUANTITIES
        for limit in budgets_of(setting, quantity)
        for method in METHODS
    ]


def measure(run: Run, ground: Ground) -> Record:
    """Search by a method, finetune and test what it finds."""
    return SEARCHES[run.method](run, ground)


def joint(run: Run, ground: Ground) -> Record:
    """One-shot evolution by a predictor of quantized pairs."""
    setting, n = ground.setting, ground.setting.n_joint
    predictor, _ = trained(ground, "kernel", n)
    started = time.process_time()
    found = evolved(setting.space, predictor.fast(), run, ground)
    facts = {
        "predicted": found[1],
        "search": asdict(SearchCost()),
        "shared": shared(ground, ground.measured(n)),
        "cpu_s": round(time.process_time() - started, 1),
    }
    return {**finished(found[0], run, ground), **facts}


def refined(run: Run, ground: Ground) -> Record:
    """Evolution in rounds, which measures what it finds."""
    subnet, facts = refined_subnet(run, ground)
    return {**finished(subnet, run, ground), **facts, "shared": shared(ground, search_cost(ground))}


def float_nas(run: Run, ground: Ground) -> Record:
    """The best float architecture for each uniform pair of bits; the short finetune picks the pair."""
    space = ground.setting.space
    _ = ground.float_predictor  # is not counted
    started, candidates = time.process_time(), []
    accuracy = ground.float_predictor.fast()
    for w_bits in ground.setting.bit_choices:
        for a_bits in ground.setting.bit_choices:
            uniform = at_uniform_bits(space, w_bits, a_bits)
            if PopulationCost(uniform, run.quantity, COST_MODEL, SCOPE).cheapest()[0] <= run.limit:
                subnet, _ = evolved(uniform, lambda genes: accuracy(in_full_space(space, genes)), run, ground)
                candidates.append(in_space(space, uniform, subnet))
    if not candidates:
        raise NoResult("no architecture is within the budget at uniform bits")
    scores = [ground.short_top1(subnet, number) for number, subnet in enumerate(candidates)]
    facts = {
        "search_top1": max(scores),
        "search": asdict(ground.measured(len(scores))),
        "shared": shared(ground, SearchCost()),
        "cpu_s": round(time.process_time() - started, 1),
    }
    return {**finished(candidates[int(np.argmax(scores))], run, ground), **facts}


def sequential(run: Run, ground: Ground) -> Record:
    """Architecture, then channels, then bits."""
    setting, recipe = ground.setting, ground.setting.recipe
    config = sequential_config(run, ground)
    parts = Parts(supernet=ground.supernet, predictor=ground.float_predictor, recipe=recipe, cost_model=COST_MODEL)
    session, started = replace(ground.session, splits=ground.final_splits), time.process_time()
    try:
        found = run_sequential(config, parts, session)
    except UserError as error:
        raise NoResult(str(error)) from error
    seconds, side = time.process_time() - started, found.spec.resolution
    seed_epoch(run.seed, 0)
    n_images = recipe.recalibration_images
    quantized_model(found.net, found.bits.policy, ground.final_splits, side, n_images, ground.device)
    pruning = SearchCost(scored_images=setting.pruning_episodes * config.val_images)
    return {
        **ground.final(found.net, side),
        "cost": found.bits.episode["cost"],
        "search_top1": found.bits.episode["accuracy"],
        "search": asdict(ground.measured(len(found.bits.history)) + pruning + ground.float_finetune()),
        "shared": shared(ground, SearchCost()),
        "cpu_s": round(seconds, 1),
        "stages": [asdict(stage) for stage in found.stages],
        "strategy": found.bits.policy.strategy,
    }


def sequential_config(run: Run, ground: Ground) -> SequentialConfig:
    """Its settings. Of what the budget is below 8 bits in the fixed network, half (in the logarithm) is left to bits,
    the rest to the architecture: with one ratio for all budgets the tightest could not be met."""
    setting, recipe = ground.setting, ground.setting.recipe
    share = run.limit / ground.fixed_task(run.quantity).costs.reference
    choices, agent = setting.bit_choices, replace(setting.agent, seed=run.seed)
    return SequentialConfig(
        quantity=run.quantity,
        split=Split(constraint=run.limit, prune_ratio=PRUNE_RATIO, preserve_ratio=min(1.0, share**0.5)),
        evolution=replace(setting.evolution, seed=run.seed),
        pruning_agent=replace(agent, episodes=setting.pruning_episodes),
        recalibration_images=setting.pruning_images,
        finetune=replace(recipe.finetune, epochs=FLOAT_EPOCHS),
        bits_agent=agent,
        train_images=recipe.pair_epoch_images,
        val_images=setting.val_images,
        min_bit=choices[0],
        max_bit=choices[-1],
        quantizer=recipe.quantizer,
    )


def evolved(
    space: SearchSpace, accuracy: Callable[[np.ndarray], np.ndarray], run: Run, ground: Ground
) -> tuple[Subnet, float]:
    """The best subnet of an evolution within the budget, and its predicted accuracy."""
    cost = PopulationCost(space, run.quantity, COST_MODEL, SCOPE)
    config = replace(ground.setting.evolution, seed=run.seed)
    found = EvolutionFinder(space, accuracy, cost.predict, run.limit, config, cost.cheapest_genes(), cost.unit).run()
    return found.subnet, found.accuracy


def at_uniform_bits(space: SearchSpace, w_bits: int, a_bits: int) -> SearchSpace:
    """The space with one bit-width for the weights and one for the activations of all operands that are searched."""
    kinds, shared_operands = (
        tuple(replace(one, choices=(w_bits if one.operand == "w" else a_bits,)) for one in operands)
        for operands in (space.operands, space.shared_operands)
    )
    return replace(space, operands=kinds, shared_operands=shared_operands)


def in_space(space: SearchSpace, uniform: SearchSpace, subnet: Subnet) -> Subnet:
    """A subnet of a space of uniform bits as the same network in the whole space, where idle slots have other bits."""
    return subnet_from_spec(space, {**architecture_of(uniform, subnet), **policy_of(uniform, subnet)})


def finished(subnet: Subnet, run: Run, ground: Ground) -> Record:
    """Accuracy of a subnet after the final finetune, its cost, its genes."""
    space, recipe = ground.setting.space, ground.setting.recipe
    seed_epoch(run.seed, 0)
    net: nn.Module = quantized_subnet(
        ground.quantized, subnet, ground.final_splits, recipe.recalibration_images, ground.device
    )
    return {
        **ground.final(net, subnet.resolution),
        "cost": subnet_cost(space, subnet, run.quantity, COST_MODEL),
        "genes": genes_of(space, [subnet])[0].tolist(),
    }


def shared(ground: Ground, more: SearchCost) -> Record:
    """What all budgets share: the float pairs and `more`."""
    return {**asdict(ground.scored(ground.setting.n_float) + more), "by": "all budgets"}


SEARCHES: dict[str, Callable[[Run, Ground], Record]] = {
    "joint": joint,
    "refined": refined,
    "sequential": sequential,
    "float-nas": float_nas,
    "agent": evidence_bits.measure,
}
METHODS = tuple(SEARCHES)
QUESTION = Question(
    name="joint",
    title="Does joint search pay?",
    methods=METHODS,
    figures=evidence_bits.FIGURES,
    runs=runs,
    measure=measure,
)
