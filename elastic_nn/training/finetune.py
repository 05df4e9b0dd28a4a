"""Training of one network: a quantized subnet from the weights of its supernet, or any other network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from apq.checkpoint import check_fit
from apq.files import Record
from apq.resume import NOT_KEPT, Resume
from apq.schema import fields, number, whole
from apq.subnet import Subnet
from dataset.splits import Batches, Splits, make_loader
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.training.batchnorm import collect_ranges, recalibrate, recalibration_batches
from elastic_nn.training.calibration import calibrate_ranges, steps_learned
from elastic_nn.training.distributed import check_agreement
from elastic_nn.training.engine import EVALUATION_BATCH, Training, evaluate, seed_epoch, to_device, train_one_epoch
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.session import Session
from elastic_nn.training.tally import Hits, Tally

CALIBRATION_IMAGES = 256
RANGE_IMAGES = 1024  # on which BatchQuant's ranges are collected after each epoch of a finetune


def quantized_subnet(
    supernet: DynamicQuantizedProxylessNASNets, subnet: Subnet, splits: Splits, n_images: int, device: torch.device
) -> MBConvNet:
    """Cut a subnet out and calibrate it at its bits. It can be finetuned or, with learned steps, used."""
    supernet.activate(subnet)
    net = supernet.get_active_subnet().to(device)
    calibrate(net, splits, subnet.resolution, n_images, device)
    return net


def calibrate(
    net: MBConvNet,
    splits: Splits,
    side: int,
    n_images: int,
    device: torch.device,
    subnets: Sequence[Callable[[], object]] = (lambda: None,),
) -> None:
    """Choose the ranges of a network's quantizers, unless they are learned steps; recalibrate BatchNorm at its bits.

    BatchQuant's ranges are recalibrated together with BatchNorm. Before ranges are chosen, BatchNorm is recalibrated in
    full precision. Under the statistics of another network, such as the supernet, activations would have other
    magnitudes and every range would be wrong.

    Ranges of a supernet are chosen with each of `subnets`, functions that activate one, under its own BatchNorm; in the
    end BatchNorm is that of the last.
    """
    batches = recalibration_batches(splits, (side,), device, n_images)

    def begin(activate: Callable[[], object]) -> None:
        activate()
        recalibrate(net, batches, device, n_images)

    subnets[-1]()
    if not steps_learned(net):
        images = calibration_images(splits, side, device)
        calibrate_ranges(net, images, [partial(begin, activate) for activate in subnets])
    recalibrate(net, batches, device, n_images)


def calibration_images(splits: Splits, side: int, device: torch.device) -> Tensor:
    """The images on which ranges are chosen: (N, C, side, side)."""
    n = CALIBRATION_IMAGES
    images, _ = next(iter(make_loader(splits.calibration, n, sides=(side,), n_images=n, device=device)))
    return to_device(images, device)


def averaged(net: nn.Module, decay: float | None) -> AveragedModel | None:
    """An exponential moving average of a network's weights and statistics, to update after each step.

    Integers, such as labels of clusters, are copied, not averaged. Without a decay it is None.
    """
    if decay is None:
        return None
    moving_average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def average(averages: list[Tensor], latest: list[Tensor], n_averaged: Tensor | int) -> None:  # of one dtype
        if averages[0].is_floating_point():
            moving_average(averages, latest, n_averaged)
        else:
            torch._foreach_copy_(averages, latest)

    return AveragedModel(net, multi_avg_fn=average, use_buffers=True)


def train_epochs(
    net: nn.Module, session: Session, config: TrainConfig, *, side: int, n_images: int | None = None
) -> list[Hits]:
    """Train a network for all epochs, without validation. It is left as the last epoch made it.

    Returns the accuracy within each epoch: of predictions on training images, each made before the step on its batch.
    With `n_images` an epoch has that many training images, drawn anew. BatchQuant's ranges, which training drops, are
    collected at the end.
    """
    training = Training(net, config, session.device, execution=session.execution)
    batches, within = train_batches(session, config, side, n_images), []
    for epoch in range(config.epochs):
        seed_epoch(session.seed, epoch)
        training.tally = Tally(session.device)
        train_one_epoch(training, batches, epoch)
        within.append(training.tally.total(session.execution)[0])
    calibration = recalibration_batches(session.splits, (side,), session.device, RANGE_IMAGES)
    collect_ranges(net, calibration, session.device, RANGE_IMAGES)
    return within


def finetune(
    net: nn.Module,
    session: Session,
    config: TrainConfig,
    *,
    side: int,
    resume: Resume = NOT_KEPT,
    log: Callable[[Record], None] = lambda record: None,
) -> tuple[float, dict[str, Tensor]]:
    """Train a network on images of `side` pixels. Returns its best validation top-1 (0 to 1) and the weights then.

    It is measured before the first epoch and after each one. A moving average, if there is one, is measured and
    returned instead. BatchQuant's ranges, which training drops, are collected after each epoch; before the first one
    the network must be calibrated. The network is left as the last epoch made it. The state is saved after every epoch.
    """
    execution, device = session.execution, session.device
    training = Training(net, config, device, execution=execution, average=averaged(net, execution.ema))
    train = train_batches(session, config, side)
    calibration = recalibration_batches(session.splits, (side,), device, RANGE_IMAGES)
    val = session.loader(session.splits.val, EVALUATION_BATCH, sides=(side,))
    state = resume.load(partial(_check, training))
    check_agreement({"state to continue from": state and state["epoch"]}, execution)
    if state is not None:
        training.load_state_dict(state["training"])
        start, best, best_top1 = state["epoch"], state["best"], state["best_top1"]
    else:
        start, best_top1 = 0, evaluate(training.result, val, device, execution=execution).top1
        best = _copy(training.result)
        log({"epoch": 0, "val_top1": best_top1})
    bar = session.bar(range(start, config.epochs), resume.what)
    for epoch in bar:
        seed_epoch(session.seed, epoch)
        loss = train_one_epoch(training, train, epoch)
        collect_ranges(training.result, calibration, device, RANGE_IMAGES)
        top1 = evaluate(training.result, val, device, execution=execution).top1
        bar.note(loss=f"{loss:.3f}", val_top1=f"{top1:.4f}")
        log({"epoch": epoch + 1, "loss": loss, "val_top1": top1})
        if top1 >= best_top1:  # of equal epochs the later one is kept
            best, best_top1 = _copy(training.result), top1
        resume.save({"epoch": epoch + 1, "training": training.state_dict(), "best": best, "best_top1": best_top1})
    return best_top1, best


def _check(training: Training, state: Any) -> None:
    """UserError unless a finetune of this network can have saved the state."""
    fields(
        epoch=whole(1, training.config.epochs),
        training=training.check_state,
        best=lambda weights: check_fit(weights, training.result.state_dict()),
        best_top1=number(0, 1),
    )(state)


def train_batches(session: Session, config: TrainConfig, side: int, n_images: int | None = None) -> Batches:
    """The training images of every epoch, in batches; `n_images` of them, drawn anew (None: all)."""
    return session.loader(session.splits.train, config.batch_size, shuffle=True, sides=(side,), n_images=n_images)


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().clone() for key, tensor in net.state_dict().items()}
