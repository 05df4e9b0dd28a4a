"""The files in the repository belong together and have the accuracies in their records."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT

from apq.checkpoint import digest, load_checkpoint
from apq.experiment import Experiment
from apq.files import read_json
from apq.genes import largest_subnet, subnets_of
from apq.layers import layers_of
from apq.presets import DIGITS, QFA_MBV3_GLYPHS
from apq.search_result import read_result
from dataset import load_splits
from dataset.pairs import PairStore
from dataset.splits import make_loader
from elastic_nn.networks.subnet_file import load_finetuned
from elastic_nn.networks.supernet_file import load_quantized_supernet, load_supernet
from elastic_nn.training.batchnorm import recalibrate
from elastic_nn.training.engine import evaluate
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.recipes import get_recipe
from utils.predictor_files import load_predictor
from utils.predictor_scores import score
from utils.predictor_training import holdout_split

CPU, MODELS = torch.device("cpu"), ROOT / "models/digits"


def test_supernet_reaches_its_recorded_accuracy():
    net, origin = load_supernet(MODELS / "supernet.pt")
    records = read_json(MODELS / "training.json")
    assert origin.recipe == records["recipe"] == "digits"
    net.activate(largest_subnet(DIGITS))
    alone, splits = net.get_active_subnet(), load_splits(DIGITS)
    recalibrate(alone, make_loader(splits.calibration, 64), CPU)
    top1 = evaluate(alone, make_loader(splits.val, 256), CPU).top1
    assert top1 == pytest.approx(records["phases"][-1]["largest_top1"], abs=0.01)
    assert top1 > 0.9


@pytest.mark.parametrize("bits", [4, 2])
def test_oqa_experiments_have_what_their_search_measured(bits):
    experiment = Experiment(ROOT / f"exps/oqa-{bits}bit")
    net, space, subnet, images = load_finetuned(experiment)
    assert {(layer.w_bits, layer.a_bits) for layer in layers_of(space, subnet)} == {(bits, bits), (32, 32)}
    splits = load_splits(space)
    assert images == splits.source
    top1 = evaluate(net, make_loader(splits.val, 256, sides=(subnet.resolution,)), CPU).top1
    front = read_json(experiment.front)
    assert [top1] == pytest.approx(read_json(experiment.acc), abs=0.005)
    assert max(point["top1"] for point in front) == read_json(experiment.acc)[0]
    supernet, _ = load_supernet(ROOT / read_result(experiment).found_subnet.models / "supernet.pt")
    assert supernet.space == space
    assert digest(supernet.state_dict()) == read_json(experiment.path / "evaluated.json")["supernet"]


@pytest.mark.parametrize(
    ("space", "part"),
    [(DIGITS, "acc"), (DIGITS, "acc_quant"), (QFA_MBV3_GLYPHS, "acc_quant")],
    ids=["digits-float", "digits", "qfa"],
)
def test_predictors_belong_to_pairs_and_supernet(space, part):
    store, models = PairStore(ROOT / "dataset/NetInfo" / space.name / part), ROOT / "models" / space.name
    genes, accuracies = store.load(space)
    record = load_checkpoint(models / f"{part}.pt")
    assert record["data"]["n_pairs"] == len(genes) >= 300
    load = load_quantized_supernet if part == "acc_quant" else load_supernet
    weights = digest(load(models / "supernet.pt")[0].state_dict())
    assert record["data"]["supernet"] == weights == read_json(store.path / "meta.json")["supernet"]
    _, held_out = holdout_split(len(genes), record["predictor_training"]["holdout"], record["data"]["seed"])
    found = score(load_predictor(models / f"{part}.pt", space), genes[held_out], accuracies[held_out])
    assert found.rmse == pytest.approx(record["scores"]["rmse"], abs=1e-4)
    assert found.kendall_tau > 0.5


def test_pairs_of_mixed_precision_are_what_the_supernet_gives_without_training():
    net, _ = load_supernet(ROOT / "models/qfa-mbv3-glyphs/supernet.pt")
    genes, accuracies = PairStore(ROOT / "dataset/NetInfo/qfa-mbv3-glyphs/acc_quant").load(net.space)
    splits = load_splits(net.space)
    for subnet, accuracy in zip(subnets_of(net.space, genes[:2]), accuracies[:2], strict=True):
        alone = quantized_subnet(net, subnet, splits, get_recipe("qfa-glyphs", net.space).recalibration_images, CPU)
        top1 = evaluate(alone, make_loader(splits.val, 256, sides=(subnet.resolution,)), CPU).top1
        assert top1 == pytest.approx(accuracy, abs=0.01)


def test_mixed_precision_started_from_the_float_supernet():
    start, _ = load_supernet(ROOT / "models/qfa-mbv3-glyphs-float/supernet.pt")
    record = read_json(ROOT / "models/qfa-mbv3-glyphs/training.json")
    assert record["started_from"]["weights"] == digest(start.state_dict())
