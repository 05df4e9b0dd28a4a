"""Quantized networks of given policies: how well one does after a short finetune, and one made ready for a long one.

HAQ (Wang et al., CVPR 2019) scores each policy of a search by a short finetune from the same trained network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from apq.policy import QUANTIZERS, Policy
from dataset.splits import Splits, make_loader
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.quantize_model import quantize_model, set_policy
from elastic_nn.quantizers import SCHEMES, KMeansWeightQuantizer
from elastic_nn.training.batchnorm import RECALIBRATION_BATCH, recalibrate
from elastic_nn.training.calibration import calibrate_ranges, calibration_table, signed_inputs
from elastic_nn.training.engine import (
    EVALUATION_BATCH,
    ONE_PROCESS,
    DivergedError,
    Execution,
    evaluate,
    to_device,
)
from elastic_nn.training.finetune import CALIBRATION_IMAGES, train_epochs
from elastic_nn.training.recipe import TrainConfig

SEARCH_ITERATIONS = 3  # of k-means while policies are compared, as in HAQ


def calibration_images(splits: Splits, side: int, device: torch.device) -> Tensor:
    """The images that ranges are chosen on: (N, C, side, side)."""
    images, _ = next(iter(make_loader(splits.calibration, CALIBRATION_IMAGES, sides=(side,))))
    return to_device(images, device)


def quantized_model(
    net: nn.Module, policy: Policy, splits: Splits, side: int, n_images: int, device: torch.device
) -> dict[str, bool]:
    """Quantize a trained float network in place, ready to finetune: ranges or clusters chosen, BatchNorm recalibrated
    at its bits on `n_images`. Returns which layers have inputs of both signs."""
    net.to(device)
    images = calibration_images(splits, side, device)
    signed = signed_inputs(net, policy.names, images)
    quantize_model(net, policy.names, SCHEMES[policy.quantizer], signed)
    set_policy(net, policy)
    calibrate_ranges(net, images)
    recalibrate(net, make_loader(splits.calibration, RECALIBRATION_BATCH, sides=(side,)), device, n_images)
    return signed


class PolicyScorer:
    """Validation top-1 of policies of one trained network, each after the same short finetune from its float weights.

    `config` says how to finetune, on `train_images` drawn anew; `val_images` are the validation images looked at.
    The network is quantized in place. Ranges and clusters of every number of bits are chosen once, beforehand. Every
    policy sees the same batches, so equal policies score equal and others differ by their bits alone. `original` is the
    float network's own top-1 on these images.
    """

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        quantizer: str,
        splits: Splits,
        config: TrainConfig,
        *,
        side: int,
        train_images: int,
        val_images: int,
        seed: int,
        device: torch.device,
        execution: Execution = ONE_PROCESS,
    ) -> None:
        self.net, self.splits, self.config, self.side = net.to(device), splits, config, side
        self.train_images, self.seed, self.device, self.execution = train_images, seed, device, execution
        val = splits.val.thinned(val_images)
        self._val = make_loader(
            val, EVALUATION_BATCH, rank=execution.rank, world_size=execution.world_size, sides=(side,)
        )
        self.original = self._top1()
        images = calibration_images(splits, side, device)
        signed = signed_inputs(net, names, images)
        self._float = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        quantize_model(net, names, SCHEMES[quantizer], signed)
        for layer in quantized_layers(net).values():
            if isinstance(layer.weight_quant, KMeansWeightQuantizer):
                layer.weight_quant.max_iter = SEARCH_ITERATIONS
        fewest, most = QUANTIZERS[quantizer]
        self._calibrated = calibration_table(net, images, range(fewest, most + 1))

    def top1(self, policy: Policy) -> float:
        """Top-1 (0 to 1) of a policy; 0 where its finetune diverges."""
        with torch.no_grad():
            for key, tensor in self._state().items():
                tensor.copy_(self._float[key])
        set_policy(self.net, policy)
        for name, layer in quantized_layers(self.net).items():
            for kind in ("weight_quant", "act_quant"):
                quantizer = getattr(layer, kind)
                if not isinstance(quantizer, nn.Identity):
                    quantizer.load_state_dict(self._calibrated[name, kind, quantizer.bits])
        try:
            train_epochs(
                self.net,
                self.splits,
                replace(self.config, epochs=1),
                seed=self.seed,
                device=self.device,
                side=self.side,
                n_images=self.train_images,
                execution=self.execution,
            )
            return self._top1()
        except DivergedError:
            return 0.0

    def _top1(self) -> float:
        return evaluate(self.net, self._val, self.device, execution=self.execution).top1

    def _state(self) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in self.net.state_dict().items() if key in self._float}
