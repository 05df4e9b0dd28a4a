"""Changes the product for tests/test_concurrency.py, in `preloaded.Preloaded("side_by_side")`.

Accuracies of pairs are made up, pictures empty and trainings of predictors short: what is tested is who writes what.
"""

from __future__ import annotations

import time
from functools import partial

import elastic_nn.training.pairs
import methods.evolution.task
import methods.prepare.predictor
from apq.files import atomic_open


def made_up(supernet, subnet, *args):
    """An accuracy that depends on the subnet, after a while: two runs that start at once shall meet."""
    time.sleep(0.03)
    return sum(subnet.e) / 1000


def draw_nothing(history, path, **options):
    """Write a file in place of a picture."""
    with atomic_open(path, "wb") as file:
        file.write(b"picture")


methods.prepare.predictor.PredictorConfig = partial(methods.prepare.predictor.PredictorConfig, epochs=2)
elastic_nn.training.pairs.subnet_top1 = made_up
methods.evolution.task.plot_history = draw_nothing
