"""Bits by sensitivity: measure every operand alone, choose by integer programming, score the choice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apq.files import Record
from apq.resume import Journal
from elastic_nn.training.session import Session
from methods.search.bit_choices import BitChoices
from methods.search.bit_search import FoundPolicy, Task, choices_of, make_scorer, policy_of_bits
from methods.sensitivity.allocation import allocate
from methods.sensitivity.config import SensitivitySearch
from methods.sensitivity.losses import LossMeasurement, Sensitivities, cases_of, loss_batches, measure_losses


@dataclass(frozen=True, kw_only=True)
class BySensitivity:
    """The chosen policy, with the sensitivities as its history.

    Attributes:
        float_loss: loss of the float network on the training images that sensitivities are measured on.
        predicted: sum of the increases of the loss of all operands whose bits are chosen, each measured alone.
        measured: increase of the loss with the whole policy, before any finetune.
    """

    found: FoundPolicy
    float_loss: float
    predicted: float
    measured: float

    def record(self) -> Record:
        """The losses as plain data."""
        names = {"float_loss": self.float_loss, "predicted_increase": self.predicted}
        return {**names, "measured_increase": self.measured}


def search_by_sensitivity(
    task: Task, config: SensitivitySearch, session: Session, journal: Journal | None = None
) -> BySensitivity:
    """Choose the policy whose increases of the loss, each measured with one operand alone, have the least sum.

    The network of the task is quantized in place, and left as the finetune of the policy trained it. The seed of the
    session draws the images of the losses and of that finetune.
    """
    bits = config.bits
    choices = choices_of(task, bits)
    scorer = make_scorer(task, bits, config.train, session)
    calibrated, cases = scorer.calibrated, cases_of(choices)
    batches = loss_batches(session, task.spec.resolution, config.loss_images)
    measurement = LossMeasurement(calibrated=calibrated, batches=batches, device=session.device)
    sensitivities = Sensitivities.of(choices, cases, measure_losses(measurement, cases, session, journal))
    chosen = chosen_bits(choices, sensitivities)
    policy = policy_of_bits(task.layers, bits.quantizer, chosen)
    calibrated.restore(policy)
    measured = measurement.loss_as_it_is() - sensitivities.float_loss
    score = scorer.accuracy(policy)
    episode = {"accuracy": score.top1, "top5": score.top5, "cost": choices.costs.total(chosen)}
    history = sensitivities.records(cases, calibrated.names)
    return BySensitivity(
        found=FoundPolicy(policy=policy, episode=episode, history=history, original=scorer.original.top1),
        float_loss=sensitivities.float_loss,
        predicted=sensitivities.total(chosen),
        measured=measured,
    )


def chosen_bits(choices: BitChoices, sensitivities: Sensitivities) -> np.ndarray:
    """(layers, 2 or 1) the bits within the budget whose predicted increase is least."""
    cells = choices.allowed_cells()
    losses = np.where(np.isfinite(cells), sensitivities.of_pairs(), 0.0)
    n = len(cells)
    taken = allocate(losses.reshape(n, -1), cells.reshape(n, -1), choices.budget)
    return np.stack(np.unravel_index(taken, cells.shape[1:]), axis=1)[:, : choices.fixed.shape[1]] + 1
