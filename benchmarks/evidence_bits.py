"""Does HAQ's agent find better bits than simpler methods? On the fixed network, at the latency budgets.

The methods are those of `benchmarks/bit_methods.py`. The runs of the agent are those of the question "joint". Random
policies are as many as the agent has episodes. Uniform bits are all pairs from 2 to 8 that fit the budget, but those
of which a pair with more bits fits, too. Sensitivities are measured once for all budgets. The best policy of each
method has the final finetune.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace

from apq.errors import UserError
from apq.files import Record
from apq.policy import policy_from_strategy
from benchmarks.bit_methods import METHODS, BitMethods, Chosen
from benchmarks.evidence_ground import Ground, NoResult, SearchCost
from benchmarks.evidence_lines import Question, Run
from benchmarks.evidence_setting import Setting, budgets_of
from elastic_nn.training.engine import seed_epoch
from elastic_nn.training.policies import quantized_model

QUANTITY = "latency"
FIGURES = (("test_top1", "test top-1", 100, 2), ("val_top1", "validation top-1", 100, 2), ("cost", "cost", 1, 4))


def runs(setting: Setting, seed: int) -> list[Run]:
    """The runs of a seed, but those of the agent."""
    return [
        Run(question="bits", seed=seed, method=method, quantity=QUANTITY, limit=limit)
        for limit in budgets_of(setting, QUANTITY)
        for method in METHODS
        if method != "agent"
    ]


def measure(run: Run, ground: Ground) -> Record:
    """Choose bits of the fixed network by a method, finetune and test it."""
    setting, recipe, side = ground.setting, ground.setting.recipe, ground.fixed_subnet.resolution
    methods = BitMethods(
        bits=setting.bit_search(run.quantity, run.limit),
        agent=replace(setting.agent, seed=run.seed),
        train=recipe.episode,
        dominated=False,
        loss_images=setting.loss_images,
        losses=ground.folder.path / "losses",
    )
    _ = ground.fixed_weights  # is not counted
    started, task = time.process_time(), ground.fixed_task(run.quantity)
    try:
        chosen = methods.choose(run.method, task, ground.session)
    except UserError as error:
        raise NoResult(str(error)) from error
    seconds = time.process_time() - started
    clean = ground.fixed_task(run.quantity)
    policy = policy_from_strategy(chosen.policy.quantizer, clean.layers, chosen.policy.strategy)
    seed_epoch(run.seed, 0)
    n_images = recipe.recalibration_images
    quantized_model(clean.net, policy, ground.final_splits, side, n_images, ground.device)
    return {
        **ground.final(clean.net, side),
        "cost": clean.costs.total(policy.matrix()),
        "search_top1": max(chosen.scores),
        "search": asdict(cost_of(chosen, ground)),
        "shared": {**asdict(ground.float_finetune()), "by": "all budgets, methods of the fixed network"},
        "cpu_s": round(seconds, 1),
        "strategy": policy.strategy,
        **chosen.facts,
    }


def cost_of(chosen: Chosen, ground: Ground) -> SearchCost:
    """What the choice has cost: policies measured, and losses of single operands."""
    losses = SearchCost(scored_images=chosen.facts.get("losses", 0) * chosen.facts.get("loss_images", 0))
    return ground.measured(len(chosen.scores)) + losses


QUESTION = Question(
    name="bits",
    title="Does the agent choose better bits than simpler methods?",
    methods=METHODS,
    figures=FIGURES,
    runs=runs,
    measure=measure,
    borrows=lambda run: run.question == "joint" and run.method == "agent" and run.quantity == QUANTITY,
)
