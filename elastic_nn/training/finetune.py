"""Training of one network: a quantized subnet from a supernet's weights, or any other from its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.subnet import Subnet
from dataset.splits import Splits, make_loader
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.training.averaging import averaged
from elastic_nn.training.batchnorm import RECALIBRATION_BATCH, collect_ranges, recalibrate
from elastic_nn.training.calibration import calibrate_ranges, quantizers_off, steps_learned
from elastic_nn.training.distributed import check_agreement
from elastic_nn.training.engine import (
    EVALUATION_BATCH,
    ONE_PROCESS,
    Execution,
    TrainConfig,
    evaluate,
    make_optimizer,
    seed_epoch,
    to_device,
    train_one_epoch,
)

CALIBRATION_IMAGES = 256
RANGE_IMAGES = 1024  # that BatchQuant's ranges are collected on between the epochs of a finetune


def quantized_subnet(
    supernet: DynamicQuantizedProxylessNASNets, subnet: Subnet, splits: Splits, n_images: int, device: torch.device
) -> MBConvNet:
    """Cut a subnet out and calibrate it at its bits: ready to finetune or, with learned steps, to be used."""
    supernet.activate(subnet)
    net = supernet.get_active_subnet().to(device)
    calibrate(net, splits, subnet.resolution, n_images, device)
    return net


def calibrate(net: MBConvNet, splits: Splits, side: int, n_images: int, device: torch.device) -> None:
    """Choose a network's quantizer ranges, unless they are learned steps, and recalibrate its BatchNorm at its bits,
    with it the ranges of BatchQuant.

    For ranges BatchNorm is recalibrated in full precision first: under the statistics of another network, such as the
    supernet that a subnet is cut out of, activations have other sizes and every range would be wrong.
    """
    batches = _calibration_batches(splits, side)
    if not steps_learned(net):
        with quantizers_off(net):
            recalibrate(net, batches, device, n_images)
        images, _ = next(iter(make_loader(splits.calibration, CALIBRATION_IMAGES, sides=(side,))))
        calibrate_ranges(net, to_device(images, device))
    recalibrate(net, batches, device, n_images)


def train_epochs(
    net: MBConvNet,
    splits: Splits,
    config: TrainConfig,
    *,
    seed: int,
    device: torch.device,
    side: int,
    n_images: int | None = None,
    execution: Execution = ONE_PROCESS,
) -> None:
    """Train a network for all epochs and leave it as the last one made it, without looking at the validation images.

    With `n_images` an epoch is so many training images, drawn anew. The ranges of BatchQuant are collected anew at the
    end: it keeps none while it trains.
    """
    optimizer = make_optimizer(net, config)
    share = execution.share
    train = make_loader(splits.train, config.batch_size, shuffle=True, share=share, sides=(side,), n_images=n_images)
    for epoch in range(config.epochs):
        seed_epoch(seed, epoch)
        train_one_epoch(net, train, optimizer, config, epoch, device=device, execution=execution)
    collect_ranges(net, _calibration_batches(splits, side), device, RANGE_IMAGES)


def finetune(
    net: nn.Module,
    splits: Splits,
    config: TrainConfig,
    *,
    seed: int,
    device: torch.device,
    side: int,
    describe: str | None = None,
    state_file: Path | None = None,
    asked: dict[str, Any] | None = None,
    restart: bool = False,
    execution: Execution = ONE_PROCESS,
    ema: float | None = None,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Train a network on images of `side`, measuring it on the validation split after each epoch and before the first.

    The ranges of BatchQuant, which training drops, are collected anew after each epoch: a network with them comes
    calibrated. Returns the best validation top-1 and the weights that reached it (with `ema`, a decay, those of the
    moving average); the network is left as the last epoch made it. With a `state_file` the state is saved after
    every epoch and the same call continues; `asked` guards against mixing runs: the state of another one is an
    error, or with `restart` it is dropped. With `describe` a progress bar of that name is shown.
    """
    optimizer, average = make_optimizer(net, config), averaged(net, ema)
    measured = net if average is None else average.module

    def val_top1() -> float:
        return evaluate(measured, val, device, execution=execution).top1

    after_step = (lambda: None) if average is None else (lambda: average.update_parameters(net))
    share = execution.share
    train = make_loader(splits.train, config.batch_size, shuffle=True, share=share, sides=(side,))
    val = make_loader(splits.val, EVALUATION_BATCH, share=share, sides=(side,))
    state = None
    if state_file is not None and state_file.exists():
        state = load_checkpoint(state_file, ("asked", "epoch", "net", "optimizer", "average", "best", "best_top1"))
        if state["asked"] != asked:
            if not restart:
                what = describe or "finetune"
                raise UserError(f"{state_file} belongs to another {what}; remove it or give --overwrite")
            state = None
    check_agreement({"state to continue from": state and state["epoch"]}, share)
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        start, best, best_top1 = state["epoch"], state["best"], state["best_top1"]
    else:
        start, best_top1 = 0, val_top1()
        best = _copy(measured)
        log({"epoch": 0, "val_top1": best_top1})
    bar = tqdm(range(start, config.epochs), desc=describe, disable=None if describe and execution.main else True)
    for epoch in bar:
        seed_epoch(seed, epoch)
        loss = train_one_epoch(
            net, train, optimizer, config, epoch, device=device, execution=execution, after_step=after_step
        )
        collect_ranges(measured, _calibration_batches(splits, side), device, RANGE_IMAGES)
        top1 = val_top1()
        bar.set_postfix(loss=f"{loss:.3f}", val_top1=f"{top1:.4f}")
        log({"epoch": epoch + 1, "loss": loss, "val_top1": top1})
        if top1 >= best_top1:  # of equals the later one: it has seen more
            best, best_top1 = _copy(measured), top1
        if state_file is not None and execution.main:
            save_checkpoint(
                state_file,
                {
                    "asked": asked,
                    "epoch": epoch + 1,
                    "net": net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": None if average is None else average.state_dict(),
                    "best": best,
                    "best_top1": best_top1,
                },
            )
    return best_top1, best


def _calibration_batches(splits: Splits, side: int) -> DataLoader:
    return make_loader(splits.calibration, RECALIBRATION_BATCH, sides=(side,))


def _copy(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().cpu().clone() for key, tensor in net.state_dict().items()}
