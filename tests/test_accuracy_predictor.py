from __future__ import annotations

import os
import signal
import time
import zlib

import numpy as np
import pytest
import torch
from example_spaces import ALL, CHOOSING_BITS, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import utils.fast_predictor as module
from apq.checkpoint import load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.genes import sample, subnets_of, view
from apq.presets import APQ_IMAGENET, DIGITS
from methods.search.predicted import FEWEST_ON_GPU, scorer
from utils.accuracy_predictor import AccuracyPredictor, transfer
from utils.converter import Converter
from utils.predictor_files import load_predictor, save_predictor

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)
quantizes = pytest.mark.parametrize("quantize", [True, False])


def filled(predictor, seed):
    """Parameters by the rule of the golden values."""
    state = {}
    for key, value in predictor.state_dict().items():
        draw = np.random.default_rng(zlib.crc32(key.encode()) + seed).standard_normal(tuple(value.shape))
        scale = np.sqrt(2 / np.prod(value.shape[1:])) if value.ndim >= 2 else 0.01
        state[key] = torch.from_numpy((draw * scale).astype(np.float32))
    predictor.load_state_dict(state)
    return predictor


def forward(predictor, genes):
    with torch.no_grad():
        return predictor(torch.from_numpy(predictor.converter.encode(genes))).numpy()


def test_published_predictor(golden):
    data, specs = golden("apq_predictor.json"), [row["spec"] for row in golden("apq_converter.json")["specs"]]
    predictor = filled(AccuracyPredictor(), data["SEED"])
    assert [[key, list(value.shape)] for key, value in predictor.state_dict().items()] == data["state_dict"]
    for check in data["fill_check"]:
        value = predictor.state_dict()[check["key"]].flatten()
        assert value[:3].tolist() == check["first3"]
        assert value.double().sum().item() == pytest.approx(check["sum_float64"], abs=1e-9)
    truly = data["outputs_encoded_quantize_true"]
    assert predictor.predict_accuracy(specs) == pytest.approx(truly, abs=1e-5)
    converter = Converter()
    for quantize, expected in (
        (True, truly),
        (False, data["outputs_encoded_quantize_false_as_predict_accuracy_does"]),
    ):
        features = torch.from_numpy(np.stack([converter.spec2feature(spec, quantize) for spec in specs]))
        assert predictor(features).tolist() == pytest.approx(expected, abs=1e-5)


def test_published_full_precision_predictor(golden):
    data, specs = golden("apq_predictor.json"), [row["spec"] for row in golden("apq_converter.json")["specs"]]
    predictor = filled(AccuracyPredictor(quantize=False), data["SEED"])
    assert [[key, list(value.shape)] for key, value in predictor.state_dict().items()] == data["fp_state_dict"]
    expected = data["fp_mlp_outputs_half_dim"]
    assert predictor.predict_accuracy(specs) == pytest.approx(expected, abs=1e-5)
    features = torch.from_numpy(np.stack([Converter().spec2feature(spec) for spec in specs]))
    assert predictor(features[:, :520]).tolist() == pytest.approx(expected, abs=1e-5)


@spaces
@quantizes
@given(seed=st.integers(0, 1000), n_layers=st.integers(1, 4))
@settings(max_examples=5)
def test_fast_is_the_same_function(space, quantize, seed, n_layers):
    predictor = filled(AccuracyPredictor(space, 50, n_layers, quantize), seed)
    genes = sample(space, 20, np.random.default_rng(seed))
    fast = predictor.predict(genes)
    assert fast.dtype == np.float32
    assert fast == pytest.approx(forward(predictor, genes), abs=1e-5)
    assert np.array_equal(predictor.predict(genes.astype(np.int16)), fast)  # as searches keep them


def test_fast_in_chunks_and_threads_is_the_same_function(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    monkeypatch.setattr(module, "MOST_ROWS_A_TABLE", 10)
    n_threads = torch.get_num_threads()
    predictor = filled(AccuracyPredictor(DIGITS, 30), 1)
    genes = sample(DIGITS, 100, np.random.default_rng(0))
    assert predictor.predict(genes) == pytest.approx(forward(predictor, genes), abs=1e-5)
    assert predictor.predict(genes[:0]).shape == (0,)
    assert predictor.predict(genes.astype(np.int16)) == pytest.approx(forward(predictor, genes), abs=1e-5)
    assert torch.get_num_threads() == n_threads


@pytest.mark.gpu
@spaces
def test_a_gpu_predicts_the_same(space):
    predictor, genes = filled(AccuracyPredictor(space, 50), 1), sample(space, 300, np.random.default_rng(0))
    assert predictor.fast("cuda")(genes) == pytest.approx(predictor.fast()(genes), abs=1e-5)


def test_small_populations_stay_on_the_cpu(monkeypatch):
    used = []
    monkeypatch.setattr(AccuracyPredictor, "fast", lambda self, device: used.append(str(device)))
    for population in (FEWEST_ON_GPU - 1, FEWEST_ON_GPU):
        scorer(AccuracyPredictor(TINY, 10), torch.device("cuda"), population)
    assert used == ["cpu", "cuda"]


def test_the_number_of_threads_changes_no_digit():
    predictor = filled(AccuracyPredictor(APQ_IMAGENET), 1).fast()
    genes, found = sample(APQ_IMAGENET, 1500, np.random.default_rng(0)), []
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(predictor(genes))
    finally:
        torch.set_num_threads(n_threads)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_predicts_too():
    """It has none of the threads that wait for the next call."""
    predictor, genes = AccuracyPredictor(TINY, 10).fast(), sample(TINY, 600, np.random.default_rng(0))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = predictor(genes)
        child = os.fork()
        if child == 0:
            os._exit(0 if np.array_equal(predictor(genes), expected) else 1)
        for _ in range(300):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
        assert (done, status) == (child, 0)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("space", CHOOSING_BITS.values(), ids=CHOOSING_BITS)
def test_the_policy_is_seen(space):
    predictor = filled(AccuracyPredictor(space, 50), 0)
    genes = sample(space, 1, np.random.default_rng(0))
    changed = genes.copy()
    view(space, changed).bits[:, -1, 0] = 1 - np.minimum(view(space, genes).bits[:, -1, 0], 1)
    assert predictor.predict(genes)[0] != predictor.predict(changed)[0]
    both = np.concatenate([genes, changed])
    assert predictor.predict_accuracy(subnets_of(space, both)) == pytest.approx(forward(predictor, both), abs=1e-5)


def test_fast_keeps_the_weights_it_was_made_of():
    predictor = filled(AccuracyPredictor(TINY, 20), 0)
    genes = sample(TINY, 5, np.random.default_rng(0))
    fast, before = predictor.fast(), predictor.predict(genes)
    with torch.no_grad():
        predictor.regressor.bias += 1
    assert np.array_equal(fast(genes), before)
    assert predictor.predict(genes) == pytest.approx(before + 1, abs=1e-5)


@spaces
def test_transfer_starts_as_the_full_precision_predictor(space):
    full = filled(AccuracyPredictor(space, 40, quantize=False), 3)
    quantized = transfer(full)
    genes = sample(space, 30, np.random.default_rng(0))
    assert quantized.quantize
    assert quantized.predict(genes) == pytest.approx(full.predict(genes), abs=1e-6)
    loss = quantized(torch.from_numpy(quantized.converter.encode(genes))).square().sum()
    loss.backward()
    assert quantized.quantize_fc.weight.grad.abs().sum() > 0
    assert not {id(p) for p in full.parameters()} & {id(p) for p in quantized.parameters()}


@spaces
@quantizes
def test_files_keep_all(space, quantize, tmp_path):
    predictor = filled(AccuracyPredictor(space, 30, 2, quantize), 4)
    record = {"data": "pairs.jsonl", "pairs": 300, "seed": 0, "scores": {"rmse": 0.01}}
    save_predictor(tmp_path / "p.pth.tar", predictor, record)
    again = load_predictor(tmp_path / "p.pth.tar", space)
    assert (again.space, again.quantize, again.hidden, again.n_layers) == (space, quantize, 30, 2)
    genes = sample(space, 10, np.random.default_rng(0))
    assert np.array_equal(again.predict(genes), predictor.predict(genes))
    kept = load_checkpoint(tmp_path / "p.pth.tar")
    del kept["state_dict"], kept["space"]
    dims = {"half_dim": predictor.converter.half_dim, "full_dim": predictor.converter.full_dim}
    assert kept == {**record, "encoding": dims}


@quantizes
def test_published_files_are_plain_state_dicts(quantize, tmp_path):
    predictor = filled(AccuracyPredictor(quantize=quantize), 1)
    save_checkpoint(tmp_path / "acc.pth", dict(predictor.state_dict()))
    again = load_predictor(tmp_path / "acc.pth")
    assert (again.space, again.quantize) == (APQ_IMAGENET, quantize)
    with pytest.raises(UserError, match=r"apq-imagenet, not to digits"):
        load_predictor(tmp_path / "acc.pth", DIGITS)


def test_a_predictor_of_another_space_is_refused(tmp_path):
    save_predictor(tmp_path / "p", AccuracyPredictor(TINY, 20))
    with pytest.raises(UserError, match=r"belongs to space tiny, not to digits"):
        load_predictor(tmp_path / "p", DIGITS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": 1}, "not a predictor"),
        ({"layers.0.0.weight": torch.zeros(3, 4)}, "does not hold a predictor of space apq-imagenet"),
        ({"layers.0.0.weight": 3}, "does not hold a predictor"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, data, message):
    save_checkpoint(tmp_path / "p", data)
    with pytest.raises(UserError, match=message):
        load_predictor(tmp_path / "p")


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no predictor at"):
        load_predictor(tmp_path / "none")
    predictor = AccuracyPredictor(TINY, 20)
    with pytest.raises(UserError, match="state_dict"):
        save_predictor(tmp_path / "p", predictor, {"state_dict": 1})
    torch.nn.init.constant_(predictor.regressor.bias, float("nan"))
    save_predictor(tmp_path / "p", predictor)
    with pytest.raises(UserError, match="not finite"):
        load_predictor(tmp_path / "p")
