"""The kernel predictor: textbook Gaussian-process regression on steps of genes, in files and searches as MLPs are."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import script
from example_spaces import ALL, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct

from apq.checkpoint import digest, load_checkpoint, save_checkpoint
from apq.errors import UserError
from apq.genes import active, sample, view
from apq.presets import DIGITS
from utils.accuracy_predictor import AccuracyPredictor
from utils.converter import Converter
from utils.gene_steps import steps_of
from utils.kernel_predictor import train_kernel_predictor
from utils.kernel_regression import (
    Kernel,
    KernelConfig,
    conditioned,
    first_logs,
    fit,
    kernel_of,
    negative_log_likelihood,
)
from utils.predictor_files import load_mlp, load_predictor, save_predictor
from utils.predictor_training import PredictorConfig, holdout_split, scored_kernel, train_predictor

search = script("search")
spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)


@spaces
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_steps_by_brute_force(space, seed):
    """Each running slot's kernel gene j of m is j + 1 ones and m - j - 1 zeros."""
    genes = sample(space, 3, np.random.default_rng(seed))
    features, groups = steps_of(space, genes)
    runs, kernels, n = active(space, genes), view(space, genes).ks, len(space.kernel_sizes)
    for row in range(3):
        for slot in range(len(space.slots)):
            expected = [float(runs[row, slot] and k <= kernels[row, slot]) for k in range(n)]
            assert features[row, groups == slot].tolist() == expected
    architecture, _ = steps_of(space, genes, policy=False)
    assert architecture.shape[1] == Converter(space).half_dim - sum(
        start < Converter(space).half_dim for start in Converter(space).always
    )
    assert set(np.unique(features)) <= {0.0, 1.0}


def drawn(n=40, k=3, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n, k)))
    return x, torch.from_numpy(np.sin(x[:, 0].numpy() * 2) + 0.5 * x[:, 1].numpy() + 0.01 * rng.normal(size=n))


def test_mean_and_spread_are_those_of_scikit_learn():
    """exp(-w d^2) is its RBF of length 1/sqrt(2 w); equal linear weights are its DotProduct."""
    (x, y), (new, _) = drawn(), drawn(15, seed=1)
    near = torch.tensor([0.7, 0.2, 0.05], dtype=torch.float64)
    kernel = Kernel(
        linear=torch.full((3,), 0.3, dtype=torch.float64),
        near=near,
        amplitude=torch.tensor(1.4, dtype=torch.float64),
        noise=torch.tensor(0.02, dtype=torch.float64),
    )
    mean, spread = conditioned(kernel, x, y).predict(new)
    theirs = ConstantKernel(1.4) * RBF((0.5 / near.numpy()) ** 0.5) + ConstantKernel(0.3) * DotProduct(1e-9)
    model = GaussianProcessRegressor(theirs, alpha=0.02 + 1e-6, optimizer=None)
    assert conditioned(kernel, x, y).expected(new).equal(mean)
    centre, scale = x.mean(0), y.std()
    model.fit((x - centre).numpy(), ((y - y.mean()) / scale).numpy())
    expected, std = model.predict((new - centre).numpy(), return_std=True)
    assert mean.numpy() == pytest.approx(expected * scale.item() + y.mean().item(), abs=1e-8)
    assert spread.numpy() == pytest.approx(std * scale.item(), abs=1e-6)


def test_the_likelihood_is_that_of_a_normal_distribution():
    x, y = drawn(12)
    kernel = kernel_of(first_logs(x, 3).detach(), torch.tensor([0, 1, 2]))
    covariance = kernel(x, x) + (kernel.noise + 1e-6) * torch.eye(12, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.zeros(12, dtype=torch.float64), covariance)
    expected = -normal.log_prob(y) - 6 * math.log(2 * math.pi)
    assert negative_log_likelihood(kernel, x, y).item() == pytest.approx(expected.item(), abs=1e-8)
    assert kernel.variance(x).numpy() == pytest.approx(kernel(x, x).diagonal().numpy())


def test_a_fit_learns_which_features_matter():
    (x, y), (new, truth) = drawn(80, 6), drawn(200, 6, seed=1)
    found = fit(x, torch.arange(6), y)
    mean, spread = found.predict(new)
    assert (mean - truth).square().mean().sqrt() < 0.2 * truth.std()
    total = found.kernel.near + found.kernel.linear
    assert total[:2].min() > 3 * total[2:].max()  # the target has the first two alone
    errors = (mean - truth).abs()
    assert (errors <= 2 * spread + 0.03).double().mean() > 0.85
    assert spread[errors > errors.median()].mean() > spread[errors <= errors.median()].mean()
    again = fit(x, torch.arange(6), y)
    assert all(a.equal(b) for a, b in zip(vars(found.kernel).values(), vars(again.kernel).values(), strict=True))


def pairs(n=200, seed=0):
    genes = sample(DIGITS, n, np.random.default_rng(seed))
    steps, _ = steps_of(DIGITS, genes)
    weights = np.random.default_rng(1).exponential(0.05, steps.shape[1])
    return genes, 0.95 - 0.4 * np.exp(-(steps @ weights))


def test_it_errs_less_than_an_mlp_on_few_pairs():
    genes, accuracies = pairs(120)
    config = PredictorConfig(epochs=60, hidden=64, lr=1e-3)
    _, of_kernel = scored_kernel(genes, accuracies, DIGITS, quantize=True, config=config)
    _, of_mlp = train_predictor(genes, accuracies, DIGITS, quantize=True, config=config)
    assert of_kernel.rmse < 0.85 * of_mlp.rmse
    assert (of_kernel.n_train, of_kernel.n_holdout) == (of_mlp.n_train, of_mlp.n_holdout)


def test_held_out_pairs_and_outliers_are_not_trained_on():
    genes, accuracies = pairs(40)
    _, held_out = holdout_split(40, 0.2, 0)
    outliers = np.zeros(40, dtype=bool)
    outliers[np.setdiff1d(np.arange(40), held_out)[:5]] = True
    first, scores = scored_kernel(genes, accuracies, DIGITS, quantize=True, outliers=outliers)
    spoiled = accuracies.copy()
    spoiled[held_out] = spoiled[outliers] = 0.1
    second, _ = scored_kernel(genes, spoiled, DIGITS, quantize=True, outliers=outliers)
    assert digest(first.state_dict()) == digest(second.state_dict())
    assert scores.n_train == 27


@spaces
@pytest.mark.parametrize("start", [None, 1, 3], ids=["scratch", "float", "float-ensemble"])
def test_files_keep_it(space, start, tmp_path):
    genes = sample(space, 30, np.random.default_rng(0))
    accuracies = np.linspace(0.2, 1.0, 30)  # 1 has infinite log-odds
    torch.manual_seed(0)
    initial = None if start is None else AccuracyPredictor(space, 8, 2, False, start)
    config = KernelConfig(steps=3)
    predictor = train_kernel_predictor(genes, accuracies, space, quantize=True, initial=initial, config=config)
    assert np.array_equal(predictor.predict(genes), predictor.mean_and_spread(genes)[0])
    save_predictor(tmp_path / "p.pt", predictor, {"scores": {}})
    again = load_predictor(tmp_path / "p.pt", space)
    others = sample(space, 20, np.random.default_rng(1))
    assert again.quantize
    for found, expected in zip(again.mean_and_spread(others), predictor.mean_and_spread(others), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
        assert np.isfinite(found).all()
    with pytest.raises(UserError, match="is a kernel"):
        load_mlp(tmp_path / "p.pt", space)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("kernel.noise", torch.tensor(-1.0), "not positive"),
        ("kernel.near", torch.ones(2), "another shape"),
        ("targets", torch.ones(3), "another shape"),
        ("targets", None, "missing"),
        ("features", torch.ones(3), "0 rows"),
        ("features", torch.ones(1, 4), "1 rows"),
        ("initial.regressor.bias", torch.ones(1), "has no layers"),
    ],
)
def test_damaged_files_are_refused(tmp_path, part, value, message):
    genes, config = sample(TINY, 12, np.random.default_rng(0)), KernelConfig(steps=1)
    predictor = train_kernel_predictor(genes, np.linspace(0.2, 0.8, 12), TINY, quantize=True, config=config)
    save_predictor(tmp_path / "p.pt", predictor)
    data = load_checkpoint(tmp_path / "p.pt")
    data["state_dict"][part] = value
    if value is None:
        del data["state_dict"][part]
    save_checkpoint(tmp_path / "p.pt", data)
    with pytest.raises(UserError, match=message):
        load_predictor(tmp_path / "p.pt")


def test_too_many_pairs_are_refused():
    genes = np.repeat(sample(TINY, 1, np.random.default_rng(0)), 5001, axis=0)
    with pytest.raises(UserError, match="too many for a kernel"):
        train_kernel_predictor(genes, np.full(5001, 0.5), TINY, quantize=True)


def test_equal_accuracies_are_predicted():
    genes = sample(TINY, 20, np.random.default_rng(0))
    predictor = train_kernel_predictor(genes, np.full(20, 0.7), TINY, quantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predictor.predict(genes) == pytest.approx(np.full(20, 0.7), abs=1e-3)


@pytest.mark.parametrize("how", [["--constraint", "0.05"], ["--mode", "nsga2"]], ids=["evolution", "nsga2"])
def test_searches_use_it(tmp_path, monkeypatch, capsys, how):
    monkeypatch.chdir(tmp_path)
    genes, accuracies = pairs(60)
    predictor, _ = scored_kernel(genes, accuracies, DIGITS, quantize=True)
    save_predictor(tmp_path / "m/acc_quant.pt", predictor)
    flags = ["--acc_predictor_dir", "m", "--generations", "3", "--population", "20", "--risk", "1", "--json"]
    search([*flags, *how, "--exp_name", "a"])
    assert 0.5 < json.loads(capsys.readouterr().out)["predicted_accuracy"] < 1
