"""The accuracy predictor of a supernet, as it is trained on pairs and on the subnets that searches have measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from apq.bounds import LARGEST_NUMBER, is_number, is_whole
from apq.errors import UserError
from apq.files import Record
from apq.resume import NOT_KEPT, Resume
from apq.schema import MOST
from apq.space import SearchSpace
from elastic_nn.training.recipe import OutlierRule
from methods.search.outliers import outliers_among
from utils.accuracy_predictor import AccuracyPredictor
from utils.kernel_predictor import check_rows
from utils.predictor_bands import Bands, bands_of
from utils.predictor_files import Predictor
from utils.predictor_scores import PredictorScores
from utils.predictor_training import (
    PredictorConfig,
    checked_split,
    kernel_settings,
    scored_kernel,
    train_predictor,
    training_record,
)

FEWEST_HELD_OUT = 1e-9  # as a fraction of the pairs: two pairs


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """A predictor to train, and all that it is trained on.

    Attributes:
        space, quantize: what it predicts accuracies of; without `quantize`, of float subnets.
        genes, accuracies: (n, genes) and (n,) pairs, from 0 to 1. The last `n_measured` were chosen and measured by
            searches: all of them are trained on. Of the others `config.holdout` are held out.
        config, is_kernel: settings, and whether a kernel is fitted instead of MLPs.
        initial: the predictor to start from.
        rule: which pairs are outliers (None: none). Measured subnets of searches are never.
    """

    space: SearchSpace
    quantize: bool
    genes: np.ndarray
    accuracies: np.ndarray
    config: PredictorConfig
    is_kernel: bool = False
    initial: AccuracyPredictor | None = None
    rule: OutlierRule | None = None
    n_measured: int = 0

    def with_measured(self, genes: np.ndarray, accuracies: np.ndarray) -> Surrogate:
        """A copy with these measured subnets, genes (n, genes) and accuracies (n,), instead of those that it has."""
        n = len(self.genes) - self.n_measured
        return replace(
            self,
            genes=np.concatenate([self.genes[:n], genes]),
            accuracies=np.concatenate([self.accuracies[:n], accuracies]),
            n_measured=len(genes),
        )

    def check_room(self, n: int) -> None:
        """UserError if `n` measured subnets are more than it can learn from."""
        if self.is_kernel:
            check_rows(len(self.genes) - self.n_measured + n)

    @functools.cached_property
    def outliers(self) -> np.ndarray | None:
        """(n,) bool: the pairs that it is not trained on; None without a rule."""
        if self.rule is None:
            return None
        found = outliers_among(self.space, self.genes, self.accuracies, self.rule)
        found[len(found) - self.n_measured :] = False
        return found

    def asked(self) -> Record:
        """All that the trained predictor depends on, as plain data, for the `Resume` of its training."""
        return training_record(self.genes, self.accuracies, **self._how())

    def trained(
        self, device: torch.device | str = "cpu", resume: Resume = NOT_KEPT
    ) -> tuple[Predictor, PredictorScores, Bands]:
        """Train it. Returns it with its scores on the held-out pairs, in all and in bands of cost.

        A kernel takes seconds, and keeps no state.
        """
        how = self._how()
        if self.is_kernel:
            predictor, scores = scored_kernel(self.genes, self.accuracies, self.space, **how)
        else:
            training = {"device": device, "resume": resume}
            predictor, scores = train_predictor(self.genes, self.accuracies, self.space, **how, **training)
        _, held_out = checked_split(self.genes, self.accuracies, self.config, n_measured=self.n_measured)
        return predictor, scores, bands_of(predictor, self.genes[held_out], self.accuracies[held_out])

    def trained_on_all(self, device: torch.device | str = "cpu") -> Predictor:
        """Train it on all pairs but two, which no training can do without, so that nothing scores it."""
        return replace(self, config=replace(self.config, holdout=FEWEST_HELD_OUT)).trained(device)[0]

    def settings(self) -> Record:
        """The settings of the training as plain data, for the predictor's file. `config_of` reads them."""
        return kernel_settings(self.config) if self.is_kernel else asdict(self.config)

    def _how(self) -> dict[str, Any]:
        how = {"quantize": self.quantize, "initial": self.initial, "config": self.config}
        return {**how, "outliers": self.outliers, "n_measured": self.n_measured}


def config_of(settings: Mapping[str, Any], seed: int) -> PredictorConfig:
    """The training settings in a predictor's file, as far as it has them; `seed` where it has none.

    UserError for settings that no training had.
    """
    known: Record = {"seed": seed}
    for field in fields(PredictorConfig):
        value = settings.get(field.name, known.get(field.name, field.default))
        checks = {int: is_whole(value, 0, MOST), float: is_number(value, 0, LARGEST_NUMBER)}
        if not checks[type(field.default)]:
            raise UserError(f"the predictor's settings are damaged: {field.name} is {str(value)[:20]}")
        known[field.name] = value
    return PredictorConfig(**known)
