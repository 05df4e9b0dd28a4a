"""How well an accuracy predictor ranks pairs that it was not trained on, and what to say where it does not."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from apq.files import Record
from utils.accuracy_predictor import AccuracyPredictor
from utils.kernel_predictor import KernelPredictor

LOWEST_TAU = 0.3  # Kendall's tau below which a predictor is of no use to a search
FEWEST_HELD_OUT = 20  # held-out pairs below which a rank correlation says nothing: at 19 tau is uncertain by 0.3
NORMAL_95 = 1.959964  # quantile of the normal distribution for intervals of 95 %


@dataclass(frozen=True, kw_only=True)
class PredictorScores:
    """Agreement of predicted and measured accuracies on held-out pairs.

    Attributes:
        n_train, n_holdout: numbers of pairs that it was trained on, and that were held out.
        rmse: root mean square error, in the unit of the accuracies.
        kendall_tau, spearman: rank correlations; None where they are undefined, because all predictions or all
            accuracies are equal.
        train_spread: standard deviation of the accuracies that it was trained on; None where it is not known.
    """

    n_train: int
    n_holdout: int
    rmse: float
    kendall_tau: float | None
    spearman: float | None
    train_spread: float | None = None

    @property
    def tau_interval(self) -> tuple[float, float] | None:
        """The interval of Kendall's tau at 95 % confidence; None where it is undefined."""
        return interval_of_tau(self.kendall_tau, self.n_holdout)

    def __str__(self) -> str:
        tau, spearman = ("undefined" if r is None else f"{r:.3f}" for r in (self.kendall_tau, self.spearman))
        if self.tau_interval is not None:
            tau += " ({:.2f} to {:.2f} at 95 % confidence)".format(*self.tau_interval)
        return f"RMSE {self.rmse:.4f}, Kendall tau {tau}, Spearman {spearman}"

    def warnings(self) -> list[str]:
        """Reasons not to rely on the predictor, each a sentence without its full stop."""
        found, tau = [], self.kendall_tau
        if self.train_spread == 0:
            found.append("all accuracies that it was trained on are equal")
        if tau is None:
            found.append("its rank correlation on held-out pairs is undefined: all predictions or accuracies are equal")
        elif tau < LOWEST_TAU:
            found.append(f"Kendall tau on held-out pairs is {tau:.3f}, below {LOWEST_TAU}: it hardly ranks subnets")
        if self.n_holdout < FEWEST_HELD_OUT:
            found.append(f"only {self.n_holdout} pairs were held out, too few to say how well it ranks")
        return found

    def facts(self) -> Record:
        """The scores, the interval and the warnings as plain data."""
        return {**asdict(self), "tau_interval": self.tau_interval, "warnings": self.warnings()}


def score(
    predictor: AccuracyPredictor | KernelPredictor,
    genes: np.ndarray,
    accuracies: np.ndarray,
    n_train: int = 0,
    train_spread: float | None = None,
) -> PredictorScores:
    """Scores of a predictor on pairs: genes `(n, genes)` and accuracies `(n,)`."""
    predicted = predictor.predict(genes).astype(np.float64)
    return PredictorScores(
        n_train=n_train,
        n_holdout=len(genes),
        rmse=float(np.sqrt(np.mean((predicted - accuracies) ** 2))),
        kendall_tau=correlation("kendalltau", predicted, accuracies),
        spearman=correlation("spearmanr", predicted, accuracies),
        train_spread=train_spread,
    )


def correlation(kind: str, predicted: np.ndarray, accuracies: np.ndarray) -> float | None:
    """A rank correlation, "kendalltau" or "spearmanr"; None where all of one side are equal."""
    from scipy import stats  # slow to import, and a search only reads scores

    if len(predicted) < 2 or not np.ptp(predicted) or not np.ptp(accuracies):
        return None
    return float(getattr(stats, kind)(predicted, accuracies).statistic)


def interval_of_tau(tau: float | None, n: int) -> tuple[float, float] | None:
    """The interval of Kendall's tau of n pairs at 95 % confidence; None where it is undefined.

    Fieller, Hartley and Pearson (Biometrika 1957): atanh(tau) has the variance 0.437 / (n - 4).
    """
    if tau is None or n <= 4 or abs(tau) >= 1:
        return None
    half = NORMAL_95 * math.sqrt(0.437 / (n - 4))
    z = math.atanh(tau)
    return math.tanh(z - half), math.tanh(z + half)


def top_decile(predicted: np.ndarray, accuracies: np.ndarray) -> float:
    """Share of the tenth predicted best that is among the measured best tenth, at least one pair; ties by their order.

    >>> top_decile(np.array([0.1, 0.9, 0.5]), np.array([0.2, 0.3, 0.4]))
    0.0
    """
    most = max(1, round(len(predicted) / 10))
    best, truly = (set(np.argsort(-values, kind="stable")[:most].tolist()) for values in (predicted, accuracies))
    return len(best & truly) / most


def scores_from_record(record: Any) -> PredictorScores | None:
    """The scores in a predictor's file or a search's record; None where there are none, as in published files."""
    known = {field.name for field in fields(PredictorScores)}
    try:
        found = PredictorScores(**{key: value for key, value in record.items() if key in known})
        correlations = (found.kendall_tau, found.spearman)
        numbers = [found.rmse, *(r for r in (*correlations, found.train_spread) if r is not None)]
        whole = all(type(n) is int and n >= 0 for n in (found.n_train, found.n_holdout))
        return found if whole and all(math.isfinite(float(n)) for n in numbers) else None
    except (AttributeError, TypeError, ValueError):
        return None


def resolution(mean_top1: float, n_images: int) -> str:
    """What accuracies around `mean_top1` (0 to 1) that were measured on so many images resolve, in words."""
    error = math.sqrt(max(mean_top1 * (1 - mean_top1), 0.0) / n_images)
    return f"{n_images} validation images: one is {100 / n_images:.2f} points, the standard error {100 * error:.2f}"


def cautions(scores: PredictorScores | None) -> list[str]:
    """Lines to print beside a prediction. None has none: published files have no scores."""
    if scores is None or not (warnings := scores.warnings()):
        return []
    return [f"warning: do not rely on the predictor: {'; '.join(warnings)}"]
