"""Joint search that measures what it finds, of `benchmarks/evidence_joint.py`: fewer random pairs, the rest in rounds.

It measures as many subnets as the one-shot search has pairs. The archive of a seed is shared by its budgets, in their
order, as by the searches of a user.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

from apq.files import Record
from apq.resume import Resume
from apq.subnet import Subnet
from benchmarks.evidence_ground import Ground, SearchCost
from benchmarks.evidence_lines import Run
from benchmarks.evidence_setting import COST_MODEL, QUANTITIES, SCOPE, Setting
from dataset.pairs import PairStore
from lut.population import PopulationCost
from methods.evolution.refining import best_measured, search_of
from methods.evolution.task import EvolutionTask
from methods.search.archive import Archive
from methods.search.measurement import Finetune, Measurement
from methods.search.refine import Refining, refine
from methods.search.surrogate import Surrogate
from utils.predictor_training import FEWEST_PAIRS, holdout_split

ROUNDS = 2
SHARE = 0.4  # of the measured subnets that searches choose; the others are random pairs


def measured_a_budget(setting: Setting) -> int:
    """How many subnets the search for a budget measures: 10 in the fashion setting."""
    return max(ROUNDS, int(SHARE * setting.n_joint / (len(QUANTITIES) * setting.n_budgets)))


def random_pairs(setting: Setting) -> int:
    """How many random pairs its predictor begins with: 120 in the fashion setting."""
    n_budgets = len(QUANTITIES) * setting.n_budgets
    return max(FEWEST_PAIRS, setting.n_joint - n_budgets * measured_a_budget(setting))


def refined_subnet(run: Run, ground: Ground) -> tuple[Subnet, Record]:
    """The best measured subnet within a budget, and the figures of its search."""
    setting, space = ground.setting, ground.setting.space
    task = EvolutionTask(
        predictor=ground.float_predictor,  # gives the space alone
        models=Path(),
        cost=PopulationCost(space, run.quantity, COST_MODEL, SCOPE),
        cost_model=COST_MODEL,
        limit=run.limit,
        config=replace(setting.evolution, seed=run.seed),
    )
    refining = refining_of(ground)
    # A killed run continues from what the archive held when it began: else it would measure more than others.
    file = ground.folder.path / f"refined-{run.quantity}-{run.limit:g}.state.pt"
    resume, started = Resume(file, {**asdict(run), "setting": setting.digest()}, "run"), time.process_time()
    found = refine(refining, search_of(task), resume=resume)
    result = best_measured(task, refining, found, {})
    facts = {
        "predicted": result.predicted_top1,
        "search_top1": result.measured_top1,
        "search": asdict(ground.measured(sum(len(one.top1) for one in found.rounds))),
        "cpu_s": round(time.process_time() - started, 1),
        **found.record(),
    }
    return result.found_subnet.subnet, facts


def refining_of(ground: Ground) -> Refining:
    """The random pairs of a seed and its archive."""
    setting, recipe = ground.setting, ground.setting.recipe
    genes, accuracies = ground.quant_pairs
    train, _ = holdout_split(len(genes), setting.holdout, ground.seed)
    rows = train[: random_pairs(setting)]
    surrogate = Surrogate(
        space=setting.space,
        quantize=True,
        genes=genes[rows],
        accuracies=accuracies[rows],
        config=ground.predictor_config(),
        is_kernel=True,
        initial=ground.float_predictor,
    )
    return Refining(
        rounds=ROUNDS,
        most=measured_a_budget(setting),
        measurement=Measurement(
            supernet=ground.quantized,
            splits=ground.splits,
            recalibration_images=recipe.recalibration_images,
            device=ground.device,
            finetune=Finetune(recipe=recipe, seed=ground.seed),
        ),
        archive=Archive(
            store=PairStore(ground.folder.path / "refined"),
            space=setting.space,
            made_by={"seed": ground.seed, "setting": setting.digest()},
        ),
        surrogate=surrogate,
    )


def search_cost(ground: Ground) -> SearchCost:
    """What all budgets share: the random pairs."""
    return ground.measured(random_pairs(ground.setting))
