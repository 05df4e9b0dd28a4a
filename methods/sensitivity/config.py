"""Settings of an allocation of bits by sensitivity. This module does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from apq.errors import UserError
from apq.files import Record
from elastic_nn.training.recipe import TrainConfig
from methods.search.settings import BitSearch

LOSS_IMAGES = 1024


@dataclass(frozen=True, kw_only=True)
class SensitivitySearch:
    """The bits, the short finetune that scores the policy, and the number of training images that losses are means of.

    UserError where that number is too small.
    """

    bits: BitSearch
    train: TrainConfig
    loss_images: int = LOSS_IMAGES

    def __post_init__(self) -> None:
        if self.loss_images < 2:
            raise UserError(f"a loss needs at least two images, not {self.loss_images}")

    def record(self) -> Record:
        """The settings as plain data."""
        return {"search": asdict(self.bits), "train": asdict(self.train), "loss_images": self.loss_images}

    def of_losses(self) -> Record:
        """The settings that the losses depend on, as plain data. The budget is none of them."""
        names = ("quantizer", "min_bit", "max_bit", "keep_ends", "is_pruned")
        bits = asdict(self.bits)
        return {**{name: bits[name] for name in names}, "loss_images": self.loss_images}
