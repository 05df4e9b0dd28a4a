"""For APQ_PLUGINS: work that is short and yet killed in its midst. Few images; states are saved often."""

from __future__ import annotations

import importlib
from dataclasses import replace

from few_images import FEW_DIGITS

from dataset.table import DATASETS
from elastic_nn.training.recipes import RECIPES

METHODS = ("evolution.search", "nsga2.front_search", "ddpg.search", "sequential.search", "prepare.predictor")
OWNERS = ("apq.resume", *(f"methods.{name}" for name in METHODS))
OFTEN, EPOCHS = 0.1, 3

DATASETS["digits"] = FEW_DIGITS
phases = [replace(phase, train=replace(phase.train, epochs=EPOCHS)) for phase in RECIPES["tiny"].phases]
RECIPES["tiny"] = replace(RECIPES["tiny"], phases=tuple(phases))
for owner in OWNERS:
    module = importlib.import_module(owner)
    assert module.SAVE_SECONDS > OFTEN
    module.SAVE_SECONDS = OFTEN
