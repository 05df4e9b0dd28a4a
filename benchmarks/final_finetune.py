"""The end of every comparison of methods: one finetune for all, its best validation epoch on the test images."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from apq.files import Record
from dataset.splits import Splits, make_loader
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate
from elastic_nn.training.finetune import finetune
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.session import Session


def finetuned(net: nn.Module, splits: Splits, recipe: Recipe, side: int, seed: int, device: torch.device) -> Record:
    """Validation and test top-1 (0 to 1) of a calibrated network after the recipe's finetune.

    It trains on all training images of the splits. The epoch with the best validation top-1 is tested.
    """
    val, weights = finetune(net, Session(splits=splits, device=device, seed=seed), recipe.finetune, side=side)
    net.load_state_dict(weights)
    test = evaluate(net, make_loader(splits.test, EVALUATION_BATCH, sides=(side,)), device)
    return {"val_top1": val, "test_top1": test.top1, "finetune": asdict(recipe.finetune)}
