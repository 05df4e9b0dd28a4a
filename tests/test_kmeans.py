"""k-means quantization of weights, against published errors and hand calculations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apq.errors import UserError
from elastic_nn.quantizers import KMeansWeightQuantizer
from elastic_nn.quantizers.kmeans import fit_kmeans
from elastic_nn.training.finetune import averaged


def test_published_errors(golden):
    data = golden("haq.json")["kmeans"]
    arrays = {name: np.array(data["arrays"][name], dtype=np.float32) for name in ("w", "tiny")}
    for case in data["results"]:
        array, errors = arrays[case["array"]], []
        for seed in range(case["n_seeds"]):
            labels, centroids = fit_kmeans(array, case["bits"], max_iter=case["max_iter"], seed=seed)
            errors.append(float(np.mean((centroids[labels] - array) ** 2)))
            assert len(centroids) <= case["n_centroids"]
        assert min(errors) == pytest.approx(case["mse_min"], rel=1e-3, abs=1e-12)
        assert np.mean(errors) == pytest.approx(case["mse_mean"], rel=1e-3, abs=1e-12)
        assert max(errors) == pytest.approx(case["mse_max"], rel=1e-3, abs=1e-12)


@given(st.integers(1, 8), st.integers(1, 60), st.integers(0, 1000))
def test_every_value_has_its_nearest_centroid(bits, n, seed):
    values = np.random.default_rng(seed).standard_normal((n, 2)).astype(np.float32)
    labels, centroids = fit_kmeans(values, bits, max_iter=50, seed=seed)
    assert labels.shape == values.shape
    assert len(centroids) == min(2**bits, 2 * n)
    assert (np.diff(centroids) >= 0).all()
    distances = np.abs(values[..., None] - centroids)
    np.testing.assert_allclose(np.abs(values - centroids[labels]), distances.min(axis=-1), atol=2e-3)  # float32 squares


def quantizer(bits, w):
    made = KMeansWeightQuantizer()
    made.bits = bits
    made.calibrate(w)
    return made


def test_gradients_are_averaged_by_cluster():
    w = torch.tensor([[0.0, 0.1, 10.0], [10.2, 0.2, 9.9]])
    made = quantizer(1, w)
    np.testing.assert_allclose(made.centroids.detach(), [0.1, (10 + 10.2 + 9.9) / 3], rtol=1e-6)
    assert made(w).tolist()[0] == pytest.approx([0.1, 0.1, 10.0333], rel=1e-4)
    grad = torch.tensor([[1.0, 2.0, 10.0], [20.0, 6.0, 60.0]])
    made(w).backward(grad)
    assert made.centroids.grad.tolist() == [3.0, 30.0]


def test_training_moves_centroids_and_keeps_clusters():
    w = torch.randn(4, 3, 3, 3)
    made = quantizer(2, w)
    labels, before = made.labels.clone(), made.centroids.detach().clone()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        made(w).square().sum().backward()
        optimizer.step()
    assert (made.labels == labels).all()
    assert (made.centroids.abs() < before.abs()).all()
    assert len(made(w).unique()) == 4


def test_state_brings_its_own_shapes():
    w = torch.randn(5, 2)
    saved = quantizer(3, w)
    empty = KMeansWeightQuantizer()
    with pytest.raises(UserError, match="calibrate"):
        empty(w)
    empty.load_state_dict(saved.state_dict())
    assert torch.equal(empty(w), saved(w))


@pytest.mark.parametrize("decay", [0.5, 0.9995])
def test_a_moving_average_keeps_clusters(decay):
    net = nn.Module()
    net.quantizer, w = quantizer(8, torch.randn(300, 3)), torch.zeros(300, 3)
    average = averaged(net, decay)
    for _ in range(20):
        average.update_parameters(net)
    assert torch.equal(average.module.quantizer.labels, net.quantizer.labels)
    torch.testing.assert_close(average.module.quantizer(w), net.quantizer(w))
    with torch.no_grad():
        net.quantizer.centroids.add_(1)
    average.update_parameters(net)
    torch.testing.assert_close(average.module.quantizer(w), net.quantizer(w) - decay)


def test_switched_off():
    w = torch.randn(5, 2)
    made = quantizer(1, w)
    made.enabled = False
    assert made(w) is w
