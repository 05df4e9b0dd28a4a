"""Searches by predicted accuracy: their predictor, and what they were asked."""

from __future__ import annotations

from pathlib import Path

from apq.checkpoint import digest
from apq.errors import UserError
from apq.files import Record
from apq.model_folder import ModelFolder
from apq.space import space_to_dict
from lut.cost_model import CostModel
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_files import load_predictor


def load_quantized_predictor(folder: Path) -> AccuracyPredictor:
    """The quantized predictor in a folder. UserError if its file holds a float one."""
    predictor = load_predictor(ModelFolder(folder).acc_quant)
    if not predictor.quantize:
        raise UserError(f"{folder}/acc_quant.pt is a float predictor: it ignores the bits")
    return predictor


def asked_of(settings: Record, predictor: AccuracyPredictor, cost_model: CostModel) -> Record:
    """All that a search depends on: its settings, the space and weights of its predictor, the costs of layers."""
    origin = {"space": space_to_dict(predictor.space), "predictor": digest(predictor.state_dict())}
    return {**settings, **origin, **cost_model.record(), "prices": cost_model.digest()}
