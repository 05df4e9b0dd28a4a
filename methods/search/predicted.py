"""Searches by predicted accuracy: their predictor, how well it ranks, and what they were asked."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from apq.checkpoint import digest
from apq.errors import UserError
from apq.files import Record
from apq.model_folder import ModelFolder
from apq.search_result import SearchResult
from apq.space import space_to_dict
from lut.cost_model import CostModel
from report.search_report import Heading
from utils.accuracy_predictor import AccuracyPredictor, FastPredictor
from utils.predictor_files import load_predictor, load_scores
from utils.predictor_scores import cautions, scores_from_record

FEWEST_ON_GPU = 256  # candidates a generation: a guess, which no GPU has timed. Two cores score them in 1.4 ms
SCORES = "predictor_scores"  # key of a search's settings: what held-out pairs say about its predictor


def load_quantized_predictor(folder: Path) -> AccuracyPredictor:
    """The quantized predictor in a folder. UserError if its file holds a float one."""
    predictor = load_predictor(ModelFolder(folder).acc_quant)
    if not predictor.quantize:
        raise UserError(f"{folder}/acc_quant.pt is a float predictor: it ignores the bits")
    return predictor


def scorer(predictor: AccuracyPredictor, device: torch.device, population: int) -> FastPredictor:
    """The predictor for a search with this population, on a GPU unless there are few candidates."""
    return predictor.fast(device if population >= FEWEST_ON_GPU else "cpu")


def recorded_scores(folder: Path) -> Record:
    """The setting that keeps the scores of the predictor in a folder with the result of a search."""
    scores = load_scores(ModelFolder(folder).acc_quant)
    return {SCORES: scores and asdict(scores)}


def beside_prediction(heading: Heading, result: SearchResult) -> Heading:
    """The heading with what held-out pairs say about the predictor: its faults as lines, all of it for --json."""
    scores = scores_from_record(result.settings.get(SCORES))
    facts = {**heading.facts, SCORES: scores and scores.facts()}
    return replace(heading, cautions=cautions(scores), facts=facts)


def warn_of_missing_supernet(folder: Path) -> None:
    """Say on stderr that what is found cannot be finetuned from this folder, before the search."""
    if not (file := ModelFolder(folder).supernet).exists():
        print(f"warning: no supernet at {file}: quant_aware.py will need its file (--supernet)", file=sys.stderr)


def asked_of(settings: Record, predictor: AccuracyPredictor, cost_model: CostModel) -> Record:
    """All that a search depends on: its settings, the space and weights of its predictor, the costs of layers."""
    origin = {"space": space_to_dict(predictor.space), "predictor": digest(predictor.state_dict())}
    return {**settings, **origin, **cost_model.record(), "prices": cost_model.digest()}
