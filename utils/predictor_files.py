"""Predictor files: weights, space and origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.presets import APQ_IMAGENET
from apq.skeleton import built_for
from apq.space import SearchSpace, space_from_dict, space_to_dict
from utils.accuracy_predictor import AccuracyPredictor
from utils.kernel_predictor import FEATURES, INITIAL, KernelPredictor, kernel_from_weights
from utils.predictor_bands import Bands, bands_from_record
from utils.predictor_scores import PredictorScores, scores_from_record

Predictor = AccuracyPredictor | KernelPredictor
FIRST, POLICY, LAST = "layers.0.0.weight", "quantize_fc.weight", "regressor.weight"


def save_predictor(path: Path, predictor: Predictor, record: Mapping[str, Any] | None = None) -> None:
    """Write a predictor, whose accuracies are from 0 to 1.

    `record` is plain data about its origin, usually `data` (folder, number of pairs, seed), `scores` (held out, see
    `load_scores`) and `bands` (see `load_bands`).
    UserError if it has keys of the file itself.
    """
    data = {
        "state_dict": {key: value.detach().cpu() for key, value in predictor.state_dict().items()},
        "space": space_to_dict(predictor.space),
        "encoding": {"half_dim": predictor.converter.half_dim, "full_dim": predictor.converter.full_dim},
    }
    if taken := set(data) & set(record or {}):
        raise UserError(f"a predictor's record may not use the names {', '.join(sorted(taken))}")
    save_checkpoint(path, {**data, **(record or {})})


def load_predictor(path: Path, space: SearchSpace | None = None) -> Predictor:
    """Load the predictor of a file: of one or several MLPs, or a kernel. UserError if its space is not `space`.

    A published file, which is a state dict alone, has a predictor of `apq-imagenet`.
    """
    if not path.exists():
        raise UserError(f"no predictor at {path}: make it with {_maker(path)}")
    data = load_checkpoint(path)
    published = FIRST in data
    if not published and (missing := [key for key in ("state_dict", "space") if key not in data]):
        raise UserError(f"{path} is not a predictor: it lacks {', '.join(missing)}")
    own_space = APQ_IMAGENET if published else space_from_dict(data["space"])
    if space is not None and own_space != space:
        raise UserError(different_spaces(f"predictor {path}", own_space, space))
    return _from_weights(path, own_space, data if published else data["state_dict"])


def load_mlp(path: Path, space: SearchSpace) -> AccuracyPredictor:
    """Load a predictor to start another one from. UserError for a kernel, which cannot."""
    predictor = load_predictor(path, space)
    if not isinstance(predictor, AccuracyPredictor):
        raise UserError(f"{path} is a kernel, which no other predictor can start from: train MLPs")
    return predictor


def load_scores(path: Path) -> PredictorScores | None:
    """The scores of a predictor on held-out pairs that its file records; None in published files."""
    return scores_from_record(load_checkpoint(path).get("scores"))


def load_bands(path: Path) -> Bands | None:
    """The scores of a predictor in bands of cost that its file records; None in published and earlier files."""
    return bands_from_record(load_checkpoint(path).get("bands"))


def _maker(path: Path) -> str:
    kind = path.stem if path.stem in ("acc", "acc_quant") else "acc_quant"
    return f"search.py --prepare {kind} --acc_predictor_dir {path.parent}"


def different_spaces(what: str, its: SearchSpace, wanted: SearchSpace) -> str:
    """The message for something that belongs to another space."""
    if its.name == wanted.name:
        return f"{what} belongs to another version of space {its.name}: their choices differ"
    return f"{what} belongs to space {its.name}, not to {wanted.name}"


def _from_weights(path: Path, space: SearchSpace, weights: Mapping[str, Any]) -> Predictor:
    try:
        if isinstance(weights, Mapping) and isinstance(weights.get(FEATURES), torch.Tensor):
            own = {str(key): value for key, value in weights.items()}
            of_initial = {key[len(INITIAL) :]: own.pop(key) for key in [*own] if key.startswith(INITIAL)}
            initial = _mlps(space, of_initial) if of_initial else None
            return kernel_from_weights(space, own, initial)
        return _mlps(space, weights)
    except UserError as error:
        raise UserError(f"{path} does not hold a predictor of space {space.name}: {error}") from error


def _mlps(space: SearchSpace, weights: Any) -> AccuracyPredictor:
    """One MLP or several. UserError for weights of anything else."""
    if not isinstance(weights, Mapping) or not isinstance(weights.get(FIRST), torch.Tensor):
        raise UserError(f"it has no {FIRST}")
    n_layers = sum(str(key).startswith("layers.") and str(key).endswith(".weight") for key in weights)
    *members, hidden, _ = [1, 1, *weights[FIRST].shape][-3:]  # several members have one more axis
    build = partial(AccuracyPredictor, space, hidden, n_layers, POLICY in weights, math.prod(members))
    return built_for(build, weights).eval()
