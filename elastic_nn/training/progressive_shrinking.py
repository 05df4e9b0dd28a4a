"""Supernet training by progressive shrinking (once-for-all, Cai et al., ICLR 2020, arXiv 1908.09791).

The largest subnet is trained alone first. Then kernels, depths and mid channels become elastic one after the other, or
all at once by the sandwich rule, with the largest subnet as the teacher. If training starts from another supernet, the
largest subnet of that one is the teacher from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from apq.checkpoint import check_fit, digest
from apq.errors import UserError
from apq.files import Record
from apq.genes import largest_subnet, smallest_subnet
from apq.resume import NOT_KEPT, Resume, State
from apq.schema import each, fields, mapping, optional, whole
from apq.space import SearchSpace, space_to_dict
from apq.subnet import Subnet
from dataset.splits import Batches
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.quantizers import FLOAT, QuantScheme
from elastic_nn.training.distributed import check_agreement
from elastic_nn.training.engine import Training, seed_epoch, train_one_epoch
from elastic_nn.training.finetune import averaged
from elastic_nn.training.inheritance import check_recipe, check_start, first_supernet, first_teacher, frozen_largest
from elastic_nn.training.pairs import subnet_top1
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.sampling import draw_subnets
from elastic_nn.training.session import Session


@dataclass(frozen=True, kw_only=True)
class SupernetPlan:
    """Which supernet is trained, by which recipe, and from which start.

    `start` is a trained supernet of the same architectures (None: from scratch): a float one, or one with learned steps
    and no fewer bits. A supernet of mixed precision needs a float one. UserError if the parts do not fit together.
    """

    space: SearchSpace
    recipe: Recipe
    scheme: QuantScheme = FLOAT
    start: DynamicProxylessNASNets | None = None

    def __post_init__(self) -> None:
        check_start(self.start, self.space, self.scheme)
        check_recipe(self.recipe, self.scheme, from_scratch=self.start is None)

    def newly_narrow(self, index: int) -> bool:
        """Whether mid channels become elastic in a phase. They are sorted before it, so that slicing keeps the best.

        Those of a `start` are sorted already.
        """
        narrow = ["e" in phase.elastic for phase in self.recipe.phases]
        return self.start is None and narrow[index] and not (index and narrow[index - 1])


def supernet_record(plan: SupernetPlan, session: Session) -> Record:
    """All that the trained supernet depends on, as plain data."""
    return {
        "space": space_to_dict(plan.space),
        "phases": [asdict(phase) for phase in plan.recipe.phases],
        "recalibration_images": plan.recipe.recalibration_images,
        "epoch_val_images": plan.recipe.epoch_val_images,
        "scheme": plan.scheme.name,
        "start": None if plan.start is None else digest(plan.start.state_dict()),
        "seed": session.seed,
        "images": session.splits.source,
        "execution": session.execution.record(per_process=plan.scheme.per_process),
    }


def train_supernet(
    plan: SupernetPlan,
    session: Session,
    resume: Resume = NOT_KEPT,
    log: Callable[[Record], None] = lambda record: None,
) -> tuple[DynamicProxylessNASNets, list[Record]]:
    """Train a supernet through all phases. Returns it and one record a phase.

    A record has the validation top-1 (0 to 1) of the largest and the smallest subnet after the phase. If the recipe has
    `epoch_val_images`, "epochs" in it has that of the largest subnet after every epoch, on these images; epoch 0 is the
    start before any training. With a moving average the result is that of the last phase. The state is saved after each
    epoch. All processes draw the same subnets.
    """
    torch.manual_seed(session.seed)
    run = _SupernetTraining(plan, session, resume, log)
    state = resume.load(run.check)
    check_agreement({"state to continue from": state and (state["phase"], state["epoch"])}, session.execution)
    if state is not None:
        run.restore(state)
    elif plan.start is not None:
        run.score_epoch(run.net, {"epoch": 0})
    first = 0 if state is None else state["phase"]
    for index in range(first, len(plan.recipe.phases)):
        result = run.phase(index, state if index == first else None)
    if result is not run.net:
        run.net.load_state_dict(result.state_dict())
    run.net.activate(largest_subnet(plan.space))
    return run.net, run.records


class _SupernetTraining:
    """The training of a supernet: network, teacher, records of phases and of the epochs of the present phase."""

    def __init__(self, plan: SupernetPlan, session: Session, resume: Resume, log: Callable[[Record], None]) -> None:
        self.plan, self.session, self.resume, self.log = plan, session, resume, log
        start, splits, n_images, device = plan.start, session.splits, plan.recipe.recalibration_images, session.device
        self.net = first_supernet(plan.space, plan.scheme, start, splits, n_images, device)
        self.teacher = None if start is None else first_teacher(start, splits, n_images, device)
        n_val = plan.recipe.epoch_val_images
        self.few = None if n_val is None else splits.val.thinned(n_val)
        self.records: list[Record] = []
        self.epochs: list[Record] = []

    def check(self, state: Any) -> None:
        """UserError unless this training can have saved the state."""
        phases = self.plan.recipe.phases
        place = {"phase": whole(0, len(phases) - 1), "epoch": whole(1, max(phase.train.epochs for phase in phases))}
        records = {"records": each(mapping), "epochs": each(mapping)}
        fields(**place, **records, training=mapping, teacher=optional(mapping))(state)
        index = state["phase"]
        if state["epoch"] > phases[index].train.epochs or len(state["records"]) not in (index, index + 1):
            raise UserError("its epoch is not one of its phase")
        self.training(index).check_state(state["training"])
        if state["teacher"] is not None:
            teacher = frozen_largest(self.net, self.session.device) if self.teacher is None else self.teacher
            check_fit(state["teacher"], teacher.state_dict())

    def restore(self, state: State) -> None:
        """Continue from a state. `phase` restores the network."""
        self.records, self.epochs = state["records"], state["epochs"]
        if state["teacher"] is not None:
            self.teacher = frozen_largest(self.net, self.session.device) if self.teacher is None else self.teacher
            self.teacher.load_state_dict(state["teacher"])

    def phase(self, index: int, state: State | None) -> nn.Module:
        """Train a phase, or the rest of it from a state. Returns the network or its moving average."""
        phase, session = self.plan.recipe.phases[index], self.session
        if state is None and self.plan.newly_narrow(index):
            for block in self.net.blocks[1:]:
                block.sort_channels()
        training = self.training(index)
        if state is not None:
            training.load_state_dict(state["training"])
        images, sides = session.splits.train, self.plan.space.resolutions
        if phase.own_resolutions:  # of each subnet: images come at the largest, see `engine`
            sides = sides[-1:]
        batches = session.loader(images, phase.train.batch_size, shuffle=True, sides=sides, n_images=phase.epoch_images)
        first = 0 if state is None else state["epoch"]
        bar = session.bar(range(first, phase.train.epochs), f"supernet: {phase.name}")
        for epoch in bar:
            loss = self.epoch(index, epoch, training, batches)
            bar.note(loss=f"{loss:.3f}")
        return training.result

    def training(self, index: int) -> Training:
        """The training of a phase, from the present weights."""
        session, last = self.session, len(self.plan.recipe.phases) - 1
        return Training(
            self.net,
            self.plan.recipe.phases[index].train,
            session.device,
            execution=session.execution,
            teacher=self.teacher,
            teacher_follows=self.plan.recipe.phases[index].teacher_follows,
            average=averaged(self.net, session.execution.ema if index == last else None),
        )

    def epoch(self, index: int, epoch: int, training: Training, batches: Batches) -> float:
        """Train an epoch, record its accuracy, save the state. Returns its loss."""
        phases = self.plan.recipe.phases
        phase, number = phases[index], sum(earlier.train.epochs for earlier in phases[:index]) + epoch
        seed_epoch(self.session.seed, number)
        rng = np.random.default_rng([self.session.seed, number])
        loss = train_one_epoch(training, batches, epoch, partial(draw_subnets, self.net, phase, rng))
        self.score_epoch(training.result, {"epoch": epoch + 1, "loss": loss})
        if epoch + 1 == phase.train.epochs:
            self.score_phase(training.result, {"phase": phase.name, "loss": loss})
            self.teacher = frozen_largest(self.net, self.session.device) if self.teacher is None else self.teacher
        self.resume.save(
            {
                "phase": index,
                "epoch": epoch + 1,
                "training": training.state_dict(),
                "teacher": None if self.teacher is None else self.teacher.state_dict(),
                "records": self.records,
                "epochs": self.epochs,
            }
        )
        return loss

    def score_epoch(self, net: DynamicProxylessNASNets, facts: Record) -> None:
        """Record an epoch with the top-1 of the largest subnet, if the recipe has `epoch_val_images`."""
        if self.few is not None:
            self.epochs.append({**facts, "largest_top1": self.top1(net, largest_subnet(net.space), self.few)})

    def score_phase(self, net: DynamicProxylessNASNets, facts: Record) -> None:
        """Record a phase with the validation top-1 of the largest and the smallest subnet."""
        val = self.session.splits.val
        largest, smallest = (self.top1(net, end(net.space), val) for end in (largest_subnet, smallest_subnet))
        epochs = {"epochs": self.epochs} if self.epochs else {}
        self.records.append({**facts, "largest_top1": largest, "smallest_top1": smallest, **epochs})
        self.epochs = []
        self.log(self.records[-1])

    def top1(self, net: DynamicProxylessNASNets, subnet: Subnet, images: Dataset) -> float:
        """Top-1 of a recalibrated subnet."""
        return subnet_top1(net, subnet, self.session, images, self.plan.recipe.recalibration_images)
