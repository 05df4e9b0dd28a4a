"""Networks quantized by a policy: accuracy after a short finetune, and preparation for a long one.

HAQ (Wang et al., CVPR 2019) scores each policy of a search after a short finetune from the same trained network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from apq.policy import Policy
from dataset.splits import Batches, Splits
from elastic_nn.networks.quantize_model import quantize_model, set_policy
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.batchnorm import recalibrate, recalibration_batches
from elastic_nn.training.calibrated import CalibratedNetwork
from elastic_nn.training.calibration import calibrate_ranges, signed_inputs
from elastic_nn.training.engine import EVALUATION_BATCH, DivergedError, evaluate, seed_epoch
from elastic_nn.training.finetune import calibration_images, train_batches, train_epochs
from elastic_nn.training.pruned import keep_zeros
from elastic_nn.training.recipe import REWARDS, TrainConfig
from elastic_nn.training.session import Session
from elastic_nn.training.tally import Hits


def quantized_model(
    net: nn.Module,
    policy: Policy,
    splits: Splits,
    side: int,
    n_images: int,
    device: torch.device,
    *,
    pruned: bool = False,
) -> dict[str, bool]:
    """Quantize a trained float network in place, ready to finetune. Returns which layers have signed inputs.

    Ranges or clusters are chosen, and BatchNorm is recalibrated at the bits of the policy on `n_images`. All weights
    become float32 first. In a `pruned` network weights that are zero stay zero.
    """
    net.to(device).float()
    images = calibration_images(splits, side, device)
    signed = signed_inputs(net, policy.names, images)
    quantize_model(net, policy.names, scheme_named(policy.quantizer), signed, images.shape[1:])
    if pruned:
        keep_zeros(net)
    set_policy(net, policy)
    calibrate_ranges(net, images)
    recalibrate(net, recalibration_batches(splits, (side,), device, n_images), device, n_images)
    return signed


@dataclass(frozen=True, kw_only=True)
class ShortFinetune:
    """How a policy is scored: trained by `train` on `train_images` an epoch, at `side` pixels.

    Attributes:
        reward: "validation": accuracy on `val_images` afterwards. "training": the best within an epoch, on the images
            that it trains on, as HAQ's linear search does.
        metric: "top1" or "top5": by which the best epoch is chosen.
        keep_zeros: whether weights that are zero stay zero, in a pruned network.
    """

    train: TrainConfig
    side: int
    train_images: int
    val_images: int
    reward: str = REWARDS[0]
    metric: str = "top1"
    keep_zeros: bool = False


class PolicyScorer:
    """Accuracy of policies of one trained network, each after the same short finetune from its float weights.

    The network is quantized in place, and becomes float32. The ranges or clusters of its layers `names` are chosen once
    for all bit-widths, at construction. All policies train on the same batches, which depend on the seed of the
    session, so that accuracies differ by the bits alone. `original` is the accuracy of the float network on the same
    images: those of validation, or those of the first epoch.
    """

    def __init__(
        self, net: nn.Module, names: Sequence[str], quantizer: str, finetune: ShortFinetune, session: Session
    ) -> None:
        self.net, self.finetune, self.session = net.to(session.device).float(), finetune, session
        val = session.splits.val.thinned(finetune.val_images)
        self._val = session.loader(val, EVALUATION_BATCH, sides=(finetune.side,))
        self.original = self._original()
        images = calibration_images(session.splits, finetune.side, session.device)
        self.calibrated = CalibratedNetwork(self.net, names, quantizer, images, zeros_stay=finetune.keep_zeros)

    def accuracy(self, policy: Policy) -> Hits:
        """Top-1 and top-5 (0 to 1) of a policy; 0 where its finetune diverges."""
        self.calibrated.restore(policy)
        how = self.finetune
        try:
            within = train_epochs(self.net, self.session, how.train, side=how.side, n_images=how.train_images)
            if how.reward == "training":
                return max(within, key=lambda hits: getattr(hits, how.metric))
            return self._on(self._val)
        except DivergedError:
            return Hits(0.0, 0.0)

    def _original(self) -> Hits:
        how = self.finetune
        if how.reward != "training":
            return self._on(self._val)
        seed_epoch(self.session.seed, 0)
        return self._on(train_batches(self.session, how.train, how.side, how.train_images))

    def _on(self, batches: Batches) -> Hits:
        found = evaluate(self.net, batches, self.session.device, execution=self.session.execution)
        return Hits(found.top1, found.top5)
