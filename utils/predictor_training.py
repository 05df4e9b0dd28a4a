"""Training of accuracy predictors on <subnet, accuracy> pairs, from scratch or transferred."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apq.checkpoint import check_fit, check_optimizer, check_settings, digest
from apq.errors import UserError
from apq.files import Record
from apq.resume import NOT_KEPT, Resume
from apq.schema import anything, fields, mapping, whole
from apq.space import SearchSpace
from elastic_nn.training.progress import Progress
from utils.accuracy_predictor import AccuracyPredictor, copied, scale_output, transfer
from utils.converter import Converter
from utils.fast_predictor import one_thread_an_operation
from utils.kernel_predictor import KernelPredictor, train_kernel_predictor
from utils.kernel_regression import KernelConfig
from utils.predictor_files import different_spaces
from utils.predictor_scores import PredictorScores, score

FEWEST_PAIRS = 10


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Settings of a predictor's training. The defaults are for hundreds to thousands of pairs. UserError where one is
    out of range.

    `members` MLPs, each `hidden` wide, are trained together. They differ in their first weights and in the order of
    their pairs.
    """

    epochs: int = 200
    lr: float = 3e-4
    weight_decay: float = 1.0  # of AdamW: strong, because a few hundred pairs are easily overfitted
    batch_size: int = 64
    holdout: float = 0.2
    hidden: int = 400
    n_layers: int = 3
    seed: int = 0
    members: int = 1

    def __post_init__(self) -> None:
        sizes = self.epochs, self.batch_size, self.hidden, self.n_layers, self.members
        if min(sizes) < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise UserError(
                "epochs, batch_size, hidden, n_layers, members and lr must be positive, weight_decay not negative"
            )
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout is the fraction of pairs kept for scoring, between 0 and 1, not {self.holdout}")


def holdout_split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices 0 to n - 1 at random into those for training and those held out (about `fraction`, at least 2)."""
    order = np.random.default_rng(seed).permutation(n)
    n_holdout = min(max(2, round(n * fraction)), n - 2)
    return np.sort(order[n_holdout:]), np.sort(order[:n_holdout])


def member_width(hidden: int, members: int) -> int:
    """Width of each of several members which together multiply as much as one MLP that is `hidden` wide.

    It is a multiple of 8, at least 8.

    >>> member_width(400, 1), member_width(400, 4), member_width(400, 5)
    (400, 200, 176)
    """
    return hidden if members == 1 else max(8, 8 * round(hidden / math.sqrt(members) / 8))


def check_members(initial: AccuracyPredictor | None, members: int) -> None:
    """UserError unless each of the `members` has a member of `initial` to start from: one each, or the only one."""
    if initial is not None and initial.members not in (1, members):
        raise UserError(
            f"the float predictor has {initial.members} members, so the quantized one cannot have {members}; "
            f"give --members {initial.members}, or train the float predictor anew"
        )


def training_record(
    genes: np.ndarray,
    accuracies: np.ndarray,
    *,
    quantize: bool,
    initial: AccuracyPredictor | None = None,
    config: PredictorConfig | None = None,
    outliers: np.ndarray | None = None,
    n_measured: int = 0,
) -> Record:
    """All that a trained predictor depends on, as plain data, for the `Resume` of its training."""
    pairs = genes.astype(np.int64).tobytes() + np.asarray(accuracies, dtype=np.float64).tobytes()
    record = {
        "config": asdict(config or PredictorConfig()),
        "pairs": hashlib.sha256(pairs).hexdigest(),
        "quantize": quantize,
        "initial": None if initial is None else digest(initial.state_dict()),
    }
    if n_measured:
        record["n_measured"] = n_measured
    return record if outliers is None else {**record, "outliers": np.flatnonzero(outliers).tolist()}


def checked_split(
    genes: np.ndarray,
    accuracies: np.ndarray,
    config: PredictorConfig,
    outliers: np.ndarray | None = None,
    n_measured: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs to train on, without outliers, and of those held out. UserError for useless pairs.

    None of the last `n_measured` is held out: searches chose them, so that they would not score a predictor fairly.
    """
    if len(genes) != len(accuracies):
        raise UserError(f"{len(genes)} subnets but {len(accuracies)} accuracies")
    if (n_pairs := len(genes) - n_measured) < FEWEST_PAIRS:
        raise UserError(f"{n_pairs} pairs are too few to train a predictor; gather at least {FEWEST_PAIRS}")
    if len(bad := np.flatnonzero(~np.isfinite(accuracies))):
        raise UserError(f"accuracy of pair {bad[0]} is {accuracies[bad[0]]}; {len(bad)} of the pairs are not finite")

    train, held_out = holdout_split(n_pairs, config.holdout, config.seed)
    train = np.append(train, np.arange(n_pairs, len(genes)))
    if outliers is not None:
        train = train[~outliers[train]]
        if (left := int((~outliers).sum())) < FEWEST_PAIRS or len(train) < 2:
            raise UserError(f"the recipe's rule of outliers leaves {left} of {len(genes)} pairs, too few to train on")
    return train, held_out


def train_predictor(
    genes: np.ndarray,
    accuracies: np.ndarray,
    space: SearchSpace,
    *,
    quantize: bool,
    initial: AccuracyPredictor | None = None,
    config: PredictorConfig | None = None,
    outliers: np.ndarray | None = None,
    n_measured: int = 0,
    device: torch.device | str = "cpu",
    resume: Resume = NOT_KEPT,
) -> tuple[AccuracyPredictor, PredictorScores]:
    """Fit a predictor to pairs: genes `(n, genes)` and accuracies `(n,)` from 0 to 1.

    Returns the predictor, on the CPU, and its scores on the held-out pairs, which it was not trained on. The same seed
    gives the same weights on one machine. UserError for too few pairs, for accuracies that are not finite, and for an
    `initial` predictor that does not fit.

    Args:
        quantize: False for accuracies of float subnets, whose bits are ignored.
        initial: predictor to start from (None: random weights). A full-precision one is transferred first if `quantize`
            is set (APQ, section 3.2).
        outliers: (n,) bool, pairs that it is not trained on. Those among the held-out pairs count in the scores.
        n_measured: the last pairs, which searches chose and measured. None of them is held out.
    """
    config, accuracies = config or PredictorConfig(), np.asarray(accuracies, dtype=np.float64)
    train, held_out = checked_split(genes, accuracies, config, outliers, n_measured)
    predictor = _start(space, quantize, initial, config)
    # Targets are standardised, so that learning rate and weight decay mean the same in every space.
    spread = float(accuracies[train].std()) if np.ptp(accuracies[train]) else 0.0  # 0 is exact: no rounding of a mean
    mean, std = float(accuracies[train].mean()), spread or 1.0
    if initial is not None:
        scale_output(predictor, 1 / std, -mean / std)
    features = torch.from_numpy(Converter(space).encode(genes[train]))
    targets = torch.from_numpy(((accuracies[train] - mean) / std).astype(np.float32))
    with one_thread_an_operation():
        _fit(predictor.to(device), features.to(device), targets.to(device), config, resume)
    scale_output(predictor.cpu(), std, mean)
    return predictor, score(predictor, genes[held_out], accuracies[held_out], len(train), spread)


def scored_kernel(
    genes: np.ndarray,
    accuracies: np.ndarray,
    space: SearchSpace,
    *,
    quantize: bool,
    initial: AccuracyPredictor | None = None,
    config: PredictorConfig | None = None,
    outliers: np.ndarray | None = None,
    n_measured: int = 0,
) -> tuple[KernelPredictor, PredictorScores]:
    """Fit a kernel to pairs, as `train_predictor` fits MLPs: the same pairs are held out. Of `config` it uses those."""
    config, accuracies = config or PredictorConfig(), np.asarray(accuracies, dtype=np.float64)
    train, held_out = checked_split(genes, accuracies, config, outliers, n_measured)
    pairs, how = (genes[train], accuracies[train]), {"quantize": quantize, "initial": initial, "seed": config.seed}
    predictor = train_kernel_predictor(*pairs, space, **how)
    spread = float(pairs[1].std()) if np.ptp(pairs[1]) else 0.0
    return predictor, score(predictor, genes[held_out], accuracies[held_out], len(train), spread)


def kernel_settings(config: PredictorConfig) -> Record:
    """All settings of `scored_kernel` as plain data."""
    return {"kernel": asdict(KernelConfig()), "holdout": config.holdout, "seed": config.seed}


def _start(
    space: SearchSpace, quantize: bool, initial: AccuracyPredictor | None, config: PredictorConfig
) -> AccuracyPredictor:
    """A new predictor to train: random, a copy of `initial`, or transferred from it."""
    if initial is not None and initial.space != space:
        raise UserError(different_spaces("the initial predictor", initial.space, space))
    if initial is not None and initial.quantize and not quantize:
        raise UserError("a quantized predictor cannot start a full-precision one; give a full-precision predictor")
    members = config.members
    check_members(initial, members)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if initial is None:
            return AccuracyPredictor(space, config.hidden, config.n_layers, quantize, members)
        if quantize and not initial.quantize:
            return transfer(initial, members)
        predictor = AccuracyPredictor(space, initial.hidden, initial.n_layers, quantize, members)
    predictor.load_state_dict(copied(initial, members))
    return predictor


def _shuffled(n: int, members: int, shuffle: torch.Generator) -> Tensor:
    """(n,) indices 0 to n - 1 in random order; for several members (members, n), each in an order of its own."""
    orders = [torch.randperm(n, generator=shuffle) for _ in range(members)]
    return torch.stack(orders) if members > 1 else orders[0]


def _fit(
    predictor: AccuracyPredictor, features: Tensor, targets: Tensor, config: PredictorConfig, resume: Resume
) -> None:
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    shuffle = torch.Generator().manual_seed(config.seed)
    parts, first = {"predictor": predictor, "optimizer": optimizer, "schedule": schedule}, 0

    def check(state: Any) -> None:
        fields(epoch=whole(1, config.epochs), shuffle=anything, **dict.fromkeys(parts, mapping))(state)
        check_fit(state["predictor"], predictor.state_dict())
        check_optimizer(state["optimizer"], optimizer)
        check_settings(state["schedule"], schedule.state_dict())
        check_fit({"shuffle": state["shuffle"]}, {"shuffle": shuffle.get_state()})

    if (state := resume.load(check)) is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        shuffle.set_state(state["shuffle"])
        first = state["epoch"]
    predictor.train()
    for epoch in Progress(range(first, config.epochs), "predictor", config.epochs, done=first, unit="epoch"):
        order = _shuffled(len(targets), predictor.members, shuffle).to(targets.device)
        for batch in order.split(config.batch_size, dim=-1):  # (b,) or (members, b)
            optimizer.zero_grad()
            # Summed over members, so that each has the gradient that it would have alone.
            F.mse_loss(predictor(features[batch]), targets[batch]).mul(predictor.members).backward()
            optimizer.step()
        schedule.step()
        if resume.due:
            states = {name: part.state_dict() for name, part in parts.items()}
            resume.save({"epoch": epoch + 1, "shuffle": shuffle.get_state(), **states})
    predictor.eval()
