"""How accurate a subnet is as it is in its supernet."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from apq.subnet import Subnet
from dataset.splits import Splits, make_loader
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.training.batchnorm import RECALIBRATION_BATCH, recalibrate
from elastic_nn.training.engine import EVALUATION_BATCH, ONE_PROCESS, Execution, evaluate


def subnet_top1(
    supernet: DynamicProxylessNASNets,
    subnet: Subnet,
    splits: Splits,
    images: Dataset,
    recalibration_images: int,
    device: torch.device,
    execution: Execution = ONE_PROCESS,
) -> float:
    """Top-1 (0 to 1) on `images` of a subnet that is cut out, recalibrated on training images and not trained.

    The supernet's quantizers must have their ranges or steps.
    """
    supernet.activate(subnet)
    net, sides = supernet.get_active_subnet(), (subnet.resolution,)
    recalibrate(net, make_loader(splits.calibration, RECALIBRATION_BATCH, sides=sides), device, recalibration_images)
    loader = make_loader(images, EVALUATION_BATCH, share=execution.share, sides=sides)
    return evaluate(net, loader, device, execution=execution).top1
