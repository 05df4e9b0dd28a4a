"""Bits by sensitivity: measure every operand alone, choose by integer programming, score the choice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apq.files import Record
from elastic_nn.training.session import Session
from methods.search.bit_choices import BitChoices
from methods.search.bit_search import FoundPolicy, Task, choices_of, make_scorer, policy_of_bits
from methods.sensitivity.allocation import allocate
from methods.sensitivity.config import SensitivitySearch
from methods.sensitivity.losses import LossMeasurement, LossStore, Sensitivities, cases_of, loss_batches, measure_losses


@dataclass(frozen=True, kw_only=True)
class BySensitivity:
    """The chosen policy, with the sensitivities as its history.

    Attributes:
        n_images: number of training images that losses are measured on.
        float_loss: loss of the float network on them.
        predicted: sum of the increases of the loss of all operands whose bits are chosen, each measured alone.
        measured: increase of the loss with the whole policy, before any finetune.
    """

    found: FoundPolicy
    n_images: int
    float_loss: float
    predicted: float
    measured: float

    def record(self) -> Record:
        """The figures as plain data."""
        increases = {"predicted_increase": self.predicted, "measured_increase": self.measured}
        return {"loss_images": self.n_images, "float_loss": self.float_loss, **increases}


def search_by_sensitivity(
    task: Task, config: SensitivitySearch, session: Session, store: LossStore | None = None
) -> BySensitivity:
    """Choose the policy whose increases of the loss, each measured with one operand alone, have the least sum.

    The network of the task is quantized in place, and left as the finetune of the policy trained it. The seed of the
    session draws the images of the losses and of that finetune. Losses in `store` are not measured again.
    """
    bits = config.bits
    choices = choices_of(task, bits)
    scorer = make_scorer(task, bits, config.train, session)
    calibrated, cases = scorer.calibrated, cases_of(choices)
    batches = loss_batches(session, task.spec.resolution, config.loss_images)
    measurement = LossMeasurement(calibrated=calibrated, batches=batches, device=session.device)
    sensitivities = Sensitivities.of(choices, cases, measure_losses(measurement, cases, session, store))
    chosen = chosen_bits(choices, sensitivities)
    policy = policy_of_bits(task.layers, bits.quantizer, chosen)
    calibrated.restore(policy)
    measured = measurement.loss_as_it_is() - sensitivities.float_loss
    score = scorer.accuracy(policy)
    episode = {"accuracy": score.top1, "top5": score.top5, "cost": choices.costs.total(chosen)}
    history = sensitivities.records(cases, calibrated.names)
    return BySensitivity(
        found=FoundPolicy(policy=policy, episode=episode, history=history, original=scorer.original.top1),
        n_images=sum(len(labels) for _, labels in batches),
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
