"""Searches by predicted accuracy: their predictor, how well it ranks, and what they were asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from apq.checkpoint import digest, load_checkpoint
from apq.errors import UserError
from apq.files import Record
from apq.model_folder import ModelFolder
from apq.search_result import SearchResult
from apq.space import space_to_dict
from dataset.pairs import PairStore
from lut.cost_model import CostModel
from report.search_report import Heading
from utils.fast_predictor import FastPredictor
from utils.kernel_predictor import KernelPredictor
from utils.predictor_bands import Bands, bands_from_record, cautions_of_band
from utils.predictor_files import Predictor, load_bands, load_predictor, load_scores
from utils.predictor_scores import PredictorScores, cautions, scores_from_record

FEWEST_ON_GPU = 256  # candidates a generation: a guess, which no GPU has timed. Two cores score them in 1.4 ms
SCORES = "predictor_scores"  # key of a search's settings: what held-out pairs say about its predictor
BANDS = "predictor_bands"  # the same in bands of cost
RISK = "risk"  # how many spreads of its prediction a candidate is ranked below it


def load_quantized_predictor(folder: Path) -> Predictor:
    """The quantized predictor in a folder. UserError if its file holds a float one."""
    predictor = load_predictor(ModelFolder(folder).acc_quant)
    if not predictor.quantize:
        raise UserError(f"{folder}/acc_quant.pt is a float predictor: it ignores the bits")
    return predictor


def scorer(predictor: Predictor, device: torch.device, population: int) -> FastPredictor | KernelPredictor:
    """The predictor for a search with this population, on a GPU unless there are few candidates."""
    return predictor.fast(device if population >= FEWEST_ON_GPU else "cpu")


def cautious(accuracy: FastPredictor | KernelPredictor, risk: float | None) -> Callable[[np.ndarray], np.ndarray]:
    """What a search ranks genes (n, genes) by: (n,) accuracies, or with --risk these less `risk` times their spread.

    UserError for a predictor of one MLP, which has none.
    """
    if not risk:
        return accuracy
    if not accuracy.has_spread:
        raise UserError(
            f"--risk {risk:g} needs a predictor that says how uncertain it is, a kernel or several members: train it "
            "with search.py --prepare acc_quant --overwrite and --predictor kernel or --members 4"
        )

    def lower(genes: np.ndarray) -> np.ndarray:
        mean, spread = accuracy.mean_and_spread(genes)
        return mean - risk * spread

    return lower


def risk_setting(risk: float | None) -> Record:
    """The setting of --risk; none where it is not given, as in earlier searches."""
    return {RISK: risk} if risk else {}


def ranking_line(settings: Record) -> list[str]:
    """A line to print beside the accuracies of a search with --risk, which are lower than predicted."""
    if not (risk := settings.get(RISK)):
        return []
    return [f"accuracies are as ranked: predicted less {risk:g} times the spread of the prediction"]


def recorded_scores(folder: Path) -> Record:
    """The settings that keep the scores of the predictor in a folder, and its bands, with the result of a search."""
    file = ModelFolder(folder).acc_quant
    return scores_of(load_scores(file), load_bands(file))


def scores_of(scores: PredictorScores | None, bands: Bands | None) -> Record:
    """The settings that keep the scores of a predictor, and its bands, with the result of a search."""
    return {SCORES: scores and asdict(scores), **({BANDS: bands.record()} if bands else {})}


def beside_prediction(heading: Heading, result: SearchResult) -> Heading:
    """The heading with what held-out pairs say about the predictor: its faults as lines, all of it for --json."""
    scores, bands = scores_from_record(result.settings.get(SCORES)), bands_from_record(result.settings.get(BANDS))
    found = result.found_subnet
    of_band = cautions_of_band(bands, found.space, found.subnet)
    facts = {**heading.facts, SCORES: scores and scores.facts(), BANDS: bands and bands.record()}
    facts["in_bad_band"] = None if bands is None else bool(of_band)
    return replace(heading, cautions=[*heading.cautions, *cautions(scores), *of_band], facts=facts)


def tell_of_measured(folder: Path) -> None:
    """Say on stderr that searches have measured subnets that the predictor in a folder does not know."""
    data = load_checkpoint(ModelFolder(folder).acc_quant).get("data")
    if not (isinstance(data, Mapping) and isinstance(data.get("pairs"), str)):
        return  # a published file
    try:
        n_more = PairStore(Path(data["pairs"])).measured().next_index() - data.get("n_measured", 0)
    except UserError as error:  # of no concern for a search that only predicts
        print(f"warning: {error}", file=sys.stderr)
        return
    if n_more > 0:
        print(
            f"searches have measured {n_more} subnets that this predictor does not know: --refine learns from them, "
            "and so does search.py --prepare acc_quant --overwrite",
            file=sys.stderr,
        )


def warn_of_missing_supernet(folder: Path) -> None:
    """Say on stderr that what is found cannot be finetuned from this folder, before the search."""
    if not (file := ModelFolder(folder).supernet).exists():
        print(f"warning: no supernet at {file}: quant_aware.py will need its file (--supernet)", file=sys.stderr)


def asked_of(settings: Record, predictor: Predictor, cost_model: CostModel) -> Record:
    """All that a search depends on: its settings, the space and weights of its predictor, the costs of layers."""
    origin = {"space": space_to_dict(predictor.space), "predictor": digest(predictor.state_dict())}
    return {**settings, **origin, **cost_model.record(), "prices": cost_model.digest()}
