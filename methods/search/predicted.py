"""What searches on predicted accuracies share: the predictor, and what an unfinished one was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from apq.checkpoint import digest
from apq.errors import UserError
from apq.model_folder import ModelFolder
from lut.cost_model import CostModel
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_files import load_predictor


def load_quantized_predictor(folder: Path) -> AccuracyPredictor:
    """The quantized predictor of a folder; UserError where its file is a float one."""
    predictor = load_predictor(ModelFolder(folder).acc_quant)
    if not predictor.quantize:
        raise UserError(f"{folder}/acc_quant.pt is a float predictor: it does not see the bits")
    return predictor


def asked_of(settings: dict[str, Any], predictor: AccuracyPredictor, cost_model: CostModel) -> dict[str, Any]:
    """All that a search depends on: its settings, the weights of its predictor, the prices of layers."""
    return {**settings, "predictor": digest(predictor.state_dict()), "prices": cost_model.fingerprint()}


def drop_other_state(state_file: Path, load: Callable[[Path, dict[str, Any]], object], asked: dict[str, Any]) -> None:
    """Remove the state of an unfinished search that was asked for something else, or that is damaged."""
    try:
        load(state_file, asked)
    except UserError:
        state_file.unlink()
