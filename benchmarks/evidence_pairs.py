"""How many pairs does a predictor need, and does it pay to start from the float one?

On the first n of the quantized pairs that are not held out are trained: an MLP that starts from the float one
("transfer", APQ's way), the same from random weights ("scratch"), and a kernel regression with the float prediction as
a feature ("kernel"). All are scored on the same held-out pairs.
"""

from __future__ import annotations

import time

import numpy as np

from apq.files import Record
from benchmarks.evidence_ground import Ground
from benchmarks.evidence_lines import Question, Run
from benchmarks.evidence_setting import Setting
from utils.predictor_files import Predictor
from utils.predictor_scores import PredictorScores, top_decile
from utils.predictor_training import holdout_split, scored_kernel, train_predictor

METHODS = ("transfer", "scratch", "kernel")
PAIRS = "pairs"  # the "quantity" of these budgets


def runs(setting: Setting, seed: int) -> list[Run]:
    """The runs of a seed."""
    return [
        Run(question="pairs", seed=seed, method=method, quantity=PAIRS, limit=n)
        for n in setting.sizes
        for method in METHODS
    ]


def measure(run: Run, ground: Ground) -> Record:
    """Train a predictor on so many pairs and score it."""
    _ = ground.quant_pairs, ground.float_predictor  # are not counted
    started = time.process_time()
    predictor, scores = trained(ground, run.method, int(run.limit))
    seconds = time.process_time() - started
    genes, accuracies = ground.quant_pairs
    _, held_out = holdout_split(len(genes), ground.setting.holdout, ground.seed)
    predicted = predictor.predict(genes[held_out])
    return {
        "rmse": scores.rmse,
        "tau": scores.kendall_tau,
        "top_tenth": top_decile(predicted, accuracies[held_out]),
        "n_train": scores.n_train,
        "n_holdout": scores.n_holdout,
        "spread": float(np.std(accuracies[held_out])),
        "cpu_s": round(seconds, 2),
    }


def trained(ground: Ground, method: str, n: int) -> tuple[Predictor, PredictorScores]:
    """A predictor of the first `n` pairs that are not held out, and its scores on those that are."""
    genes, accuracies = ground.quant_pairs
    how = {"quantize": True, "config": ground.predictor_config(), "outliers": left_out(ground, n)}
    initial = None if method == "scratch" else ground.float_predictor
    train = scored_kernel if method == "kernel" else train_predictor
    return train(genes, accuracies, ground.setting.space, initial=initial, **how)


def left_out(ground: Ground, n: int) -> np.ndarray:
    """(pairs,) bool: the pairs beyond the first `n` of those that are not held out."""
    n_all = len(ground.quant_pairs[0])
    train, _ = holdout_split(n_all, ground.setting.holdout, ground.seed)
    beyond = np.zeros(n_all, dtype=bool)
    beyond[train[n:]] = True
    return beyond


QUESTION = Question(
    name="pairs",
    title="How many pairs does a predictor need?",
    methods=METHODS,
    figures=(("rmse", "RMSE, points", 100, 2), ("tau", "Kendall tau", 1, 3), ("top_tenth", "top tenth", 1, 2)),
    runs=runs,
    measure=measure,
)
