"""Supernet training by progressive shrinking (once-for-all, Cai et al., ICLR 2020, arXiv 1908.09791).

First the largest network alone; then kernel, depth and width become elastic one after the other, or all at once by the
sandwich rule, each subnet taught by the largest one as well as by the labels. Where another supernet is there to start
from, its largest network teaches from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from tqdm import tqdm

from apq.checkpoint import digest, load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.genes import cardinalities, genes_of, largest_subnet, legalise, sample, smallest_subnet, subnets_of, view
from apq.space import FULL_PRECISION, SearchSpace, space_to_dict
from apq.subnet import Subnet
from dataset.splits import Splits, make_loader
from elastic_nn.modules.quant_layers import quantizers
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.quantizers import FLOAT, QuantScheme
from elastic_nn.training.averaging import averaged
from elastic_nn.training.distributed import check_agreement
from elastic_nn.training.engine import (
    ONE_PROCESS,
    Execution,
    make_optimizer,
    seed_epoch,
    train_one_epoch,
)
from elastic_nn.training.inheritance import check_recipe, check_start, first_supernet, first_teacher, frozen_largest
from elastic_nn.training.measuring import subnet_top1
from elastic_nn.training.recipe import Phase, Recipe


def sample_phase(
    space: SearchSpace, elastic: tuple[str, ...], n: int, rng: np.random.Generator, reach: float = 1.0
) -> list[Subnet]:
    """Random subnets that differ from the largest one only in the elastic gene parts ("ks", "d", "e", "bits").

    Of the last part only the largest choices are drawn, so many that they are a share of `reach`. Bits are those of
    the blocks and of the layers that every network has.
    """
    largest = genes_of(space, [largest_subnet(space)])
    genes = np.repeat(largest, n, axis=0)
    drawn = sample(space, n, rng)
    for part in elastic:
        getattr(view(space, genes), part)[:] = getattr(view(space, drawn), part)
        if part == "bits":
            view(space, genes).shared_bits[:] = view(space, drawn).shared_bits
    if elastic and reach < 1:
        newest = getattr(view(space, genes), elastic[-1])
        choices = getattr(view(space, cardinalities(space)[None]), elastic[-1])  # (1, ...) like newest
        newest[:] = choices - 1 - np.floor(rng.random(newest.shape) * np.ceil(reach * choices)).astype(newest.dtype)
    return subnets_of(space, legalise(space, genes, rng))


def train_supernet(
    space: SearchSpace,
    splits: Splits,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    state_file: Path,
    scheme: QuantScheme = FLOAT,
    start: DynamicProxylessNASNets | None = None,
    execution: Execution = ONE_PROCESS,
    ema: float | None = None,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
) -> tuple[DynamicProxylessNASNets, list[dict[str, Any]]]:
    """Train a supernet with the quantizers of a scheme through all phases; returns it and one record a phase.

    It starts from nothing or from `start`, a trained supernet of the same architectures: a float one, or one with
    learned steps and no fewer bits. One of mixed precision starts from a float one. UserError if that does not fit or
    if the recipe needs one.

    A record has the validation top-1 of the largest and the smallest subnet after the phase. Where the recipe says so,
    its "epochs" have that of the largest after every epoch, on fewer images; epoch 0 is the net before any
    training, with what came from `start`.

    The state is saved to `state_file` after every epoch; the same call continues from there. With `ema`, a decay, the
    net that comes back is the moving average over the last phase. All processes of `execution` sample the same subnets.
    """
    check_start(start, space, scheme)
    check_recipe(recipe, scheme, from_nothing=start is None)
    torch.manual_seed(seed)
    n_images = recipe.recalibration_images
    net = first_supernet(space, scheme, start, splits, n_images, device)
    teacher: nn.Module | None = None if start is None else first_teacher(start, splits, n_images, device)
    records: list[dict[str, Any]] = []
    asked = {
        "space": space_to_dict(space),
        "phases": [asdict(phase) for phase in recipe.phases],
        "recalibration_images": n_images,
        "epoch_val_images": recipe.epoch_val_images,
        "scheme": scheme.name,
        "start": None if start is None else digest(start.state_dict()),
        "seed": seed,
        "images": splits.source,
        "execution": execution.asked(),
        "ema": ema,
    }
    last, share = len(recipe.phases) - 1, execution.share
    few = None if recipe.epoch_val_images is None else splits.val.thinned(recipe.epoch_val_images)
    average: AveragedModel | None = None
    epochs: list[dict[str, Any]] = []
    state = _load_state(state_file, asked) if state_file.exists() else None
    if state is not None:
        net.load_state_dict(state["net"])
        records, epochs = state["records"], state["epochs"]
        if state["teacher"] is not None:
            teacher = frozen_largest(net, device) if teacher is None else teacher
            teacher.load_state_dict(state["teacher"])
    elif start is not None:
        epochs = _epoch_score(net, splits, few, recipe, device, execution, {"epoch": 0})
    check_agreement({"state to continue from": state and (state["phase"], state["epoch"])}, share)
    epochs_before = 0
    for index, phase in enumerate(recipe.phases):
        optimizer, first_epoch = make_optimizer(net, phase.train), 0
        if state is not None and index < state["phase"]:
            first_epoch = phase.train.epochs
        elif state is not None and index == state["phase"]:
            optimizer.load_state_dict(state["optimizer"])
            first_epoch = state["epoch"]
        newly_narrow = (
            start is None and "e" in phase.elastic and (index == 0 or "e" not in recipe.phases[index - 1].elastic)
        )
        if first_epoch == 0 and newly_narrow:  # the channels that survive slicing should be the best ones
            for block in net.blocks[1:]:
                block.sort_channels()
        if index == last:
            average = averaged(net, ema)
            if average is not None and first_epoch:
                average.load_state_dict(state["average"])
        after_step = (lambda: None) if average is None else partial(average.update_parameters, net)
        batches = make_loader(
            splits.train,
            phase.train.batch_size,
            shuffle=True,
            share=share,
            sides=space.resolutions,
            n_images=phase.epoch_images,
        )
        bar = tqdm(
            range(first_epoch, phase.train.epochs),
            desc=f"supernet: {phase.name}",
            disable=None if execution.main else True,
        )
        for epoch in bar:
            seed_epoch(seed, epochs_before + epoch)
            rng = np.random.default_rng([seed, epochs_before + epoch])
            loss = train_one_epoch(
                net,
                batches,
                optimizer,
                phase.train,
                epoch,
                device=device,
                teacher=teacher,
                choose=partial(draw_subnets, net, phase, rng),
                execution=execution,
                after_step=after_step,
            )
            bar.set_postfix(loss=f"{loss:.3f}")
            scored = net if average is None else average.module
            epochs += _epoch_score(scored, splits, few, recipe, device, execution, {"epoch": epoch + 1, "loss": loss})
            if epoch + 1 == phase.train.epochs:
                scores = _phase_scores(scored, splits, recipe, device, execution)
                records.append({"phase": phase.name, "loss": loss, **scores, **({"epochs": epochs} if epochs else {})})
                epochs = []
                log(records[-1])
                if teacher is None:
                    teacher = frozen_largest(net, device)
            if execution.main:
                save_checkpoint(
                    state_file,
                    {
                        "asked": asked,
                        "phase": index,
                        "epoch": epoch + 1,
                        "net": net.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "teacher": None if teacher is None else teacher.state_dict(),
                        "average": None if average is None else average.state_dict(),
                        "records": records,
                        "epochs": epochs,
                    },
                )
        epochs_before += phase.train.epochs
    if average is not None:
        net.load_state_dict(average.module.state_dict())
    net.activate(largest_subnet(space))
    return net, records


def draw_subnets(net: DynamicProxylessNASNets, phase: Phase, rng: np.random.Generator) -> list[Callable[[], None]]:
    """A step's subnets, as calls that activate them.

    Where the phase mixes in full precision, it is one more number of bits, the highest: the largest subnet has it in
    all operands, the smallest in none, a random one in a random share of them.
    """
    always = [largest_subnet(net.space), smallest_subnet(net.space)] if phase.sandwich else []
    n_random = phase.subnets_per_step - len(always)
    drawn = [sample_phase(net.space, phase.elastic, 1, rng, phase.reach)[0] for _ in range(n_random)]
    if not phase.float_share:
        return [partial(net.activate, subnet) for subnet in (*always, *drawn)]
    shares = [1.0, 0.0][: len(always)] + [phase.float_share] * n_random
    n_operands = len(quantizers(net))
    return [
        partial(activate_partly_float, net, subnet, rng.random(n_operands) < share)
        for subnet, share in zip((*always, *drawn), shares, strict=True)
    ]


def activate_partly_float(net: DynamicProxylessNASNets, subnet: Subnet, stays_float: np.ndarray) -> None:
    """Run as this subnet, but for operands `(operands,)` in full precision, until the next is activated."""
    net.activate(subnet)
    for operand, stays in zip(quantizers(net), stays_float, strict=True):
        if stays:
            operand.bits = FULL_PRECISION


def _phase_scores(
    net: DynamicProxylessNASNets, splits: Splits, recipe: Recipe, device: torch.device, execution: Execution
) -> dict[str, float]:
    """Validation top-1 of the largest and the smallest subnet, each recalibrated."""
    ends = {"largest": largest_subnet(net.space), "smallest": smallest_subnet(net.space)}
    return {
        f"{name}_top1": subnet_top1(net, subnet, splits, splits.val, recipe.recalibration_images, device, execution)
        for name, subnet in ends.items()
    }


def _epoch_score(
    net: DynamicProxylessNASNets,
    splits: Splits,
    few: Dataset | None,
    recipe: Recipe,
    device: torch.device,
    execution: Execution,
    epoch: dict[str, Any],
) -> list[dict[str, Any]]:
    """The record of an epoch with the largest subnet's top-1 on part of the validation images; none if not asked."""
    if few is None:
        return []
    largest, n_images = largest_subnet(net.space), recipe.recalibration_images
    return [{**epoch, "largest_top1": subnet_top1(net, largest, splits, few, n_images, device, execution)}]


def _load_state(file: Path, asked: dict[str, Any]) -> dict[str, Any]:
    state = load_checkpoint(
        file, ("asked", "phase", "epoch", "net", "optimizer", "teacher", "average", "records", "epochs")
    )
    if state["asked"] != asked:
        odd = ", ".join(key for key in asked if state["asked"].get(key) != asked[key])
        raise UserError(f"{file} belongs to a training with other {odd}; remove it to start anew")
    return state
