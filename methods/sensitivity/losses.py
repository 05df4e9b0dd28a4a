"""What each operand of a network costs in accuracy: the increase of the loss with that operand alone quantized.

HAWQ (Dong et al., ICCV 2019) estimates it by curvature; here it is measured. Measurements are a `Journal`, so that a
killed run continues, and are shared by the processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apq.bounds import is_number
from apq.errors import UserError
from apq.files import Record
from apq.resume import Journal
from elastic_nn.training.calibrated import CalibratedNetwork
from elastic_nn.training.distributed import check_agreement, sum_over
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate, seed_epoch
from elastic_nn.training.session import Session
from lut.measured import MOST_BITS
from methods.search.bit_choices import FREE, BitChoices
from methods.search.sharing import do_missing

OPERANDS = ("weights", "activations")


class Case(NamedTuple):
    """One operand (0 weights, 1 activations) of one layer at a number of bits."""

    layer: int
    operand: int
    bits: int


Cases = Sequence[Case | None]  # None: the network in full precision


def cases_of(choices: BitChoices) -> Cases:
    """What is measured: the float network, then each operand whose bits are chosen, at all its bits."""
    free = np.argwhere(choices.fixed == FREE).tolist()
    bits = range(choices.min_bit, choices.max_bit + 1)
    return [None, *(Case(layer, operand, b) for layer, operand in free for b in bits)]


@dataclass(frozen=True, kw_only=True)
class LossMeasurement:
    """Measures losses: means of the cross-entropy (nats) over training images without augmentation.

    `batches` are images (N, C, H, W) with labels (N,), which stay in memory.
    """

    calibrated: CalibratedNetwork
    batches: Sequence[tuple[Tensor, Tensor]]
    device: torch.device

    def loss(self, case: Case | None) -> float:
        """The loss with one operand alone quantized, or in full precision."""
        calibrated = self.calibrated
        with calibrated.in_float() if case is None else calibrated.alone(*case) as net:
            return evaluate(net, self.batches, self.device).loss

    def loss_as_it_is(self) -> float:
        """The loss of the network as it is."""
        return evaluate(self.calibrated.net, self.batches, self.device).loss


def loss_batches(session: Session, side: int, n_images: int) -> list[tuple[Tensor, Tensor]]:
    """At most `n_images` of the calibration images, drawn by the seed of the session, at `side` pixels.

    They are the same in all processes.
    """
    seed_epoch(session.seed, 0)
    images = session.splits.calibration
    return list(session.alone().loader(images, EVALUATION_BATCH, shuffle=True, sides=(side,), n_images=n_images))


@dataclass(frozen=True, kw_only=True)
class LossStore:
    """Losses of cases on disk, to which one process appends.

    `names` are those of the layers, `made_by` is all that the losses depend on, as plain data. With `lenient`, records
    of other work are replaced; otherwise they are errors.
    """

    journal: Journal
    cases: Cases
    names: Sequence[str]
    made_by: Record
    lenient: bool = False

    def begin(self) -> None:
        """Start an empty journal, unless there is one to continue."""
        try:
            if self.journal.holds(self.made_by):
                self.load()
                return
        except UserError:
            if not self.lenient:
                raise
        self.journal.start(self.made_by)

    def append(self, index: int, loss: float) -> None:
        """Add the loss of a case; it is on disk when this returns."""
        self.journal.append(self._record(index, loss))

    def load(self) -> dict[int, float]:
        """Index of a case -> its loss, of those that are measured. UserError for lines that are none of them."""
        found: dict[int, float] = {}
        for place, _, record in self.journal.records():
            index, loss = (record.get("index"), record.get("loss")) if isinstance(record, dict) else (None, None)
            fits = type(index) is int and 0 <= index < len(self.cases) and is_number(loss)
            if not fits or record != self._record(index, loss):
                raise UserError(f"{place}: not a loss of this search; {self.journal.remedy}")
            found.setdefault(index, float(loss))
        return found

    def _record(self, index: int, loss: float) -> Record:
        """One line of the journal."""
        return {"index": index, **_described(self.cases[index], self.names), "loss": loss}


def measure_losses(
    measurement: LossMeasurement, cases: Cases, session: Session, store: LossStore | None = None
) -> np.ndarray:
    """(cases,) losses. Those in the store are not measured again; each process measures its part of the others."""
    done, execution = {} if store is None else store.load(), session.execution
    check_agreement({"measured losses (their folder must be shared)": sorted(done)}, execution)
    own = torch.zeros(len(cases), dtype=torch.float64, device=session.device)

    def measure(i: int) -> None:
        own[i] = loss = measurement.loss(cases[i])
        if store is not None:
            store.append(i, loss)

    do_missing(range(len(cases)), done, measure, execution, what="sensitivities", unit="operand")
    losses = sum_over(own, execution).cpu().numpy()
    losses[list(done)] = list(done.values())
    return losses


def _described(case: Case | None, names: Sequence[str]) -> Record:
    if case is None:
        return {"layer": None, "operand": None, "bits": None}
    return {"layer": names[case.layer], "operand": OPERANDS[case.operand], "bits": case.bits}


@dataclass(frozen=True, kw_only=True)
class Sensitivities:
    """The increases of the loss over that of the float network, `float_loss`.

    `increases[layer, operand, b - 1]` is that with this operand alone at b bits: 0 where its bits are not chosen, NaN
    for bits that may not be. Increases may be negative, by chance.
    """

    float_loss: float
    increases: np.ndarray  # (layers, 2 or 1, 8)

    @classmethod
    def of(cls, choices: BitChoices, cases: Cases, losses: np.ndarray) -> Sensitivities:
        """Those of measured losses (cases,)."""
        free = (choices.fixed == FREE)[:, :, None]
        increases = np.where(free, np.nan, np.zeros(MOST_BITS))  # (layers, 2 or 1, 8)
        for case, loss in zip(cases[1:], losses[1:], strict=True):
            increases[case.layer, case.operand, case.bits - 1] = loss - losses[0]
        return cls(float_loss=float(losses[0]), increases=increases)

    def of_pairs(self) -> np.ndarray:
        """(layers, 8, 8 or 1) sums over the operands of each layer, in the order of `BitCosts.cells`."""
        weights, *activations = np.moveaxis(self.increases, 1, 0)  # (layers, 8) each
        return weights[:, :, None] + (activations[0][:, None] if activations else 0)

    def total(self, bits: np.ndarray) -> float:
        """The predicted increase with bits (layers, 2 or 1): the sum over the operands whose bits are chosen."""
        layer, operand = np.indices(bits.shape)
        return float(self.increases[layer, operand, bits - 1].sum())

    def records(self, cases: Cases, names: Sequence[str]) -> list[Record]:
        """One record for each operand and number of bits."""
        return [
            {**_described(case, names), "increase": float(self.increases[case.layer, case.operand, case.bits - 1])}
            for case in cases
            if case is not None
        ]
