"""Ways to choose the bits of one network within a budget, of which benchmarks compare the results.

agent        HAQ's agent
random       random policies, their bits lowered to the budget as those of the agent
uniform      pairs of weight and activation bits that fit the budget, the same in every layer
sensitivity  one policy, by measured sensitivities and integer programming (search.py --mode sensitivity)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apq.checkpoint import digest
from apq.files import Record
from apq.policy import Policy, layer_names
from apq.resume import Journal
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.session import Session
from methods.search.bit_choices import FREE, BudgetError
from methods.search.bit_search import Task, choices_of, make_scorer, policy_of_bits, search_bits
from methods.search.settings import AgentConfig, BitSearch, PolicySearch
from methods.sensitivity.bits import search_by_sensitivity
from methods.sensitivity.config import LOSS_IMAGES, SensitivitySearch
from methods.sensitivity.losses import LossStore, cases_of

METHODS = ("agent", "random", "uniform", "sensitivity")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A policy; top-1 (0 to 1) of the float network and of each policy that was tried; further facts."""

    policy: Policy
    original: float
    scores: list[float]
    facts: Record


@dataclass(frozen=True, kw_only=True)
class BitMethods:
    """The settings of all methods: the bits, the agent, the short finetune that scores a policy.

    With `dominated` the uniform method also tries bits of which a pair with more bits fits, too.
    Sensitivities do not depend on the budget: they are kept in the folder `losses`, if it is given.
    """

    bits: BitSearch
    agent: AgentConfig
    train: TrainConfig
    dominated: bool = True
    loss_images: int = LOSS_IMAGES
    losses: Path | None = None

    def choose(self, method: str, task: Task, session: Session) -> Chosen:
        """The policy of a method. The network of the task is quantized in place. UserError where nothing fits."""
        if method == "sensitivity":
            return self.by_sensitivity(task, session)
        if method == "uniform":
            return self.uniform(task, session)
        agent = self.agent if method == "agent" else replace(self.agent, warmup=self.agent.episodes)
        found = search_bits(task, PolicySearch(bits=self.bits, agent=agent, train=self.train), session)
        scores = [record["accuracy"] for record in found.history]
        return Chosen(policy=found.policy, original=found.original, scores=scores, facts={})

    def by_sensitivity(self, task: Task, session: Session) -> Chosen:
        config = SensitivitySearch(bits=self.bits, train=self.train, loss_images=self.loss_images)
        store = None if self.losses is None else self.loss_store(task, config, session)
        chosen = search_by_sensitivity(task, config, session, store)
        found = chosen.found
        return Chosen(
            policy=found.policy,
            original=found.original,
            scores=[found.episode["accuracy"]],
            facts=chosen.record() | {"losses": len(found.history)},
        )

    def loss_store(self, task: Task, config: SensitivitySearch, session: Session) -> LossStore:
        """The losses in the folder. UserError where they are those of other work."""
        made_by = {
            **config.of_losses(),
            "weights": digest(task.net.state_dict()),
            "images": session.splits.source,
            "seed": session.seed,
        }
        remedy = "remove it to measure them anew"
        store = LossStore(
            journal=Journal(self.losses / "asked.json", "losses", "sensitivities", remedy),
            cases=cases_of(choices_of(task, self.bits)),
            names=layer_names(task.layers),
            made_by=made_by,
        )
        store.begin()
        return store

    def uniform(self, task: Task, session: Session) -> Chosen:
        candidates = uniform_candidates(task, self.bits, dominated=self.dominated)
        if not candidates:
            raise BudgetError(
                f"no uniform bits cost at most {choices_of(task, self.bits).budget:.6g} {task.costs.unit}"
            )
        scorer = make_scorer(task, self.bits, self.train, session)
        policies = [policy_of_bits(task.layers, self.bits.quantizer, bits) for bits in candidates]
        scores = [scorer.accuracy(policy).top1 for policy in policies]
        best = policies[int(np.argmax(scores))]
        return Chosen(policy=best, original=scorer.original.top1, scores=scores, facts={})


def uniform_candidates(task: Task, config: BitSearch, *, dominated: bool = True) -> list[np.ndarray]:
    """All bits (layers, 2 or 1) within the budget that are the same in every free layer.

    Without `dominated` those are left out of which another candidate has no fewer bits of either operand. (With fewer
    bits an accelerator may be slower, so that several pairs fit of which none has more bits.)
    """
    choices = choices_of(task, config)
    numbers = np.arange(config.min_bit, config.max_bit + 1)
    pairs = np.stack(np.meshgrid(numbers, numbers), axis=-1).reshape(-1, 2)[:, : choices.fixed.shape[1]]
    pairs = np.unique(pairs, axis=0)
    bits = np.where(choices.fixed == FREE, pairs[:, None], choices.fixed)  # (pairs, layers, 2 or 1)
    fits = np.array([choices.costs.total(of_all) <= choices.budget for of_all in bits])
    pairs, bits = pairs[fits], bits[fits]
    if not dominated:
        bits = bits[~dominated_rows(pairs)]
    return list(bits)


def dominated_rows(pairs: np.ndarray) -> np.ndarray:
    """(n,) bool: which rows (n, k) are at most another row everywhere, and less somewhere.

    >>> dominated_rows(np.array([[2, 8], [4, 4], [2, 4], [4, 2]]))
    array([False, False,  True,  True])
    """
    no_more = (pairs[:, None] <= pairs[None]).all(axis=2)  # row i, row j
    less = (pairs[:, None] < pairs[None]).any(axis=2)
    return (no_more & less).any(axis=1)
