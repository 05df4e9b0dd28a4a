"""Where an accuracy predictor is bad: its scores on held-out pairs in bands of cost.

A predictor that is good on average may be of no use at one end of the costs, and a search for a budget there goes
wherever its errors are largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from apq.bounds import is_number, is_whole
from apq.files import Record
from apq.genes import genes_of
from apq.space import SearchSpace
from apq.subnet import Subnet
from lut.costs import UNITS
from lut.population import PopulationCost
from utils.accuracy_predictor import AccuracyPredictor
from utils.kernel_predictor import KernelPredictor
from utils.predictor_scores import LOWEST_TAU, correlation, interval_of_tau, top_decile

MOST_BANDS, FEWEST_IN_BAND = 4, 10
BAD_RMSE = 1.5  # times that of all bands: of ten pairs' errors that are alike one time in forty is above it


@dataclass(frozen=True, kw_only=True)
class Band:
    """Agreement of predicted and measured accuracies on the `n` held-out pairs that cost from `low` to `high`.

    Attributes:
        rmse, bias: root mean square and mean of predicted minus measured, in the unit of the accuracies.
        kendall_tau: rank correlation; None where it is undefined.
        top_decile: share of the tenth predicted best that is among the measured best tenth, at least one pair.
        is_bad: whether the error is `BAD_RMSE` times that of all bands, or the rank correlation is surely below
            `LOWEST_TAU` (at 97.5 % confidence).
    """

    low: float
    high: float
    n: int
    rmse: float
    bias: float
    kendall_tau: float | None
    top_decile: float
    is_bad: bool


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Bands of a predictor from cheap to expensive, in a `quantity` that needs no cost model: bitops or flops."""

    quantity: str
    bands: tuple[Band, ...]

    def record(self) -> Record:
        """The bands as plain data."""
        return {"quantity": self.quantity, "bands": [asdict(band) for band in self.bands]}

    def of(self, cost: float) -> Band:
        """The band of a cost; below and above all of them the first and the last."""
        return next((band for band in self.bands if cost <= band.high), self.bands[-1])

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of a printed table."""
        titles = (self.quantity, "pairs", "RMSE", "bias", "Kendall tau", "top tenth", "")
        return [
            titles,
            *(
                (
                    f"{band.low:.4g} to {band.high:.4g}",
                    str(band.n),
                    f"{band.rmse:.4f}",
                    f"{band.bias:+.4f}",
                    "-" if band.kendall_tau is None else f"{band.kendall_tau:.3f}",
                    f"{band.top_decile:.0%}",
                    "bad" if band.is_bad else "",
                )
                for band in self.bands
            ),
        ]

    def caution(self, space: SearchSpace, subnet: Subnet) -> list[str]:
        """A line to print beside the prediction of a subnet that lies in a bad band, or beyond all of them."""
        cost = float(PopulationCost(space, self.quantity).predict(genes_of(space, [subnet]))[0])
        band, where = self.of(cost), f"{cost:.4g} {UNITS[self.quantity]}"
        if not self.bands[0].low <= cost <= self.bands[-1].high:
            return [f"warning: no held-out pair is as cheap or as expensive as this subnet ({where})"]
        if not band.is_bad:
            return []
        tau = "undefined" if band.kendall_tau is None else f"{band.kendall_tau:.2f}"
        return [
            f"warning: the predictor is bad around {where}: on {band.n} held-out pairs RMSE {band.rmse:.4f}, "
            f"bias {band.bias:+.4f}, Kendall tau {tau}"
        ]


def bands_of(
    predictor: AccuracyPredictor | KernelPredictor,
    genes: np.ndarray,
    accuracies: np.ndarray,
    n_bands: int | None = None,
) -> Bands:
    """Bands of held-out pairs: genes (n, genes) and accuracies (n,). Each has about as many pairs.

    Their costs are BitOps, for a full-precision predictor MACs. `n_bands` of None: as many as have `FEWEST_IN_BAND`
    pairs, at most `MOST_BANDS`.
    """
    quantity = "bitops" if predictor.quantize else "flops"
    costs = PopulationCost(predictor.space, quantity).predict(genes)
    predicted = predictor.predict(genes).astype(np.float64)
    rmse = float(np.sqrt(np.mean((predicted - accuracies) ** 2)))
    n_bands = n_bands or min(MOST_BANDS, max(1, len(genes) // FEWEST_IN_BAND))
    parts = np.array_split(np.argsort(costs, kind="stable"), n_bands)
    return Bands(
        quantity=quantity, bands=tuple(_band(costs[rows], predicted[rows], accuracies[rows], rmse) for rows in parts)
    )


def _band(costs: np.ndarray, predicted: np.ndarray, accuracies: np.ndarray, rmse_of_all: float) -> Band:
    errors, tau = predicted - accuracies, correlation("kendalltau", predicted, accuracies)
    rmse, interval = float(np.sqrt(np.mean(errors**2))), interval_of_tau(tau, len(costs))
    return Band(
        low=float(costs.min()),
        high=float(costs.max()),
        n=len(costs),
        rmse=rmse,
        bias=float(errors.mean()),
        kendall_tau=tau,
        top_decile=top_decile(predicted, accuracies),
        is_bad=bool(rmse > BAD_RMSE * rmse_of_all or (interval is not None and interval[1] < LOWEST_TAU)),
    )


def bands_from_record(record: Any) -> Bands | None:
    """The bands in a predictor's file or a search's record; None where there are none, as in earlier files."""
    names = {field.name for field in fields(Band)}
    try:
        rows = [{name: row[name] for name in names} for row in record["bands"]]
        if not rows or record["quantity"] not in ("bitops", "flops") or not all(map(_is_whole_band, rows)):
            return None
        return Bands(quantity=record["quantity"], bands=tuple(Band(**row) for row in rows))
    except (KeyError, TypeError):
        return None


def _is_whole_band(row: Record) -> bool:
    numbers = [row[name] for name in ("low", "high", "rmse", "bias", "top_decile")]
    numbers += [row["kendall_tau"]] * (row["kendall_tau"] is not None)
    return all(map(is_number, numbers)) and is_whole(row["n"], 1, 1 << 31) and isinstance(row["is_bad"], bool)


def cautions_of_band(bands: Bands | None, space: SearchSpace, subnet: Subnet) -> Sequence[str]:
    """Lines to print beside the prediction of a subnet; none where the predictor has no bands."""
    return [] if bands is None else bands.caution(space, subnet)
