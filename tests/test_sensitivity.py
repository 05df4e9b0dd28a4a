"""Sensitivities against a direct computation, the choice of bits by them, and measurements that continue."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from apq.errors import UserError
from apq.files import append_jsonl
from apq.layers import ConvLayer
from apq.policy import layer_names, policy_from_strategy
from apq.resume import Journal
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.calibrated import CalibratedNetwork
from elastic_nn.training.finetune import calibration_images
from elastic_nn.training.policies import PolicyScorer, ShortFinetune
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.session import Session
from lut.bit_costs import BitCosts
from lut.traced import traced_layers
from methods.search.bit_choices import FREE, BitChoices, fixed_bits
from methods.sensitivity.bits import chosen_bits
from methods.sensitivity.config import SensitivitySearch
from methods.sensitivity.losses import (
    Case,
    LossMeasurement,
    LossStore,
    Sensitivities,
    cases_of,
    loss_batches,
    measure_losses,
)

CPU = torch.device("cpu")
SMALL = named_model("mobilenet_v1_small", "digits")
NAMES = layer_names(traced_layers(build_model(SMALL).to("meta"), 32, in_channels=1))
CASES = [Case(0, 0, 4), Case(3, 0, 2), Case(3, 1, 3), Case(8, 0, 5), Case(8, 1, 2), Case(len(NAMES) - 1, 1, 4)]


def network(seed=0):
    """A network whose norms have statistics of images, so that its activations have usual sizes."""
    torch.manual_seed(seed)
    net = build_model(SMALL).train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.rand(16, 1, 32, 32))
    return net.eval()


def direct_loss(few, case, quantizer, batches):
    """The loss of the float network in which a hook or new weights stand for the quantized operand."""
    net = network()
    layer, images = net.get_submodule(NAMES[case.layer]), calibration_images(few, 32, CPU)
    if case.operand == 0:
        own = scheme_named(quantizer).quick().weight()
        own.bits = case.bits
        own.calibrate(layer.weight)
        with torch.no_grad():
            layer.weight.copy_(own(layer.weight))
    else:
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            net(images)
        hook.remove()
        own = scheme_named(quantizer).activation(bool(seen[0].min() < 0))
        own.bits = case.bits
        own.calibrate(seen[0])
        layer.register_forward_pre_hook(lambda _, args: own(args[0]))
    with torch.no_grad():
        losses = [F.cross_entropy(net(images), labels, reduction="sum") for images, labels in batches]
    return float(sum(losses)) / sum(len(labels) for _, labels in batches)


def measurement_of(few, quantizer="linear", n_images=100):
    session, images = Session(splits=few, device=CPU), calibration_images(few, 32, CPU)
    calibrated = CalibratedNetwork(network(), NAMES, quantizer, images)
    return LossMeasurement(calibrated=calibrated, batches=loss_batches(session, 32, n_images), device=CPU), session


@pytest.mark.parametrize("quantizer", ["linear", "linear-published", "kmeans"])
def test_losses_are_those_of_a_direct_computation(few, quantizer):
    measurement, _ = measurement_of(few, quantizer)
    assert sum(len(labels) for _, labels in measurement.batches) == 100
    plain = network()
    with torch.no_grad():
        losses = [F.cross_entropy(plain(images), labels) for images, labels in measurement.batches]
    float_loss = measurement.loss(None)
    assert float_loss == pytest.approx(float(losses[0]), rel=1e-6)
    for case in CASES:
        if quantizer == "kmeans" and case.operand == 1:
            continue
        found = measurement.loss(case)
        assert found == pytest.approx(direct_loss(few, case, quantizer, measurement.batches), rel=1e-5), case
        assert found != float_loss
    assert measurement.loss(None) == float_loss  # nothing stays quantized


def test_a_finetune_leaves_no_trace_in_later_losses(few):
    """Weights, ranges and bits of a scored policy are gone when an operand alone is measured."""
    train = TrainConfig(epochs=1, lr=0.05, batch_size=32)
    how = ShortFinetune(train=train, side=32, train_images=64, val_images=50)
    session = Session(splits=few, device=CPU)
    scorer = PolicyScorer(network(), NAMES, "linear", how, session)
    batches = loss_batches(session, 32, 100)
    measurement = LossMeasurement(calibrated=scorer.calibrated, batches=batches, device=CPU)
    before = [measurement.loss(case) for case in (None, *CASES)]
    layers = traced_layers(build_model(SMALL).to("meta"), 32, in_channels=1)
    scorer.accuracy(policy_from_strategy("linear", layers, [[8, -1], *[[3, 3]] * (len(NAMES) - 1)]))
    # BatchNorm's statistics are tensors of the network too.
    assert [measurement.loss(case) for case in (None, *CASES)] == before


def test_images_are_drawn_by_the_seed(few):
    def labels(seed):
        ((_, found),) = loss_batches(Session(splits=few, device=CPU, seed=seed), 32, 50)
        return found.tolist()

    assert len(labels(0)) == 50
    assert labels(0) == labels(0) != labels(1)


def choices_of_table(cells, budget, *, keep_ends, min_bit=2, max_bit=8):
    """Choices of layers with these costs."""
    n = len(cells)
    layers = [ConvLayer(1, 1, 1, 1, 1, 1, 8, 8, name=str(i)) for i in range(n)]
    return BitChoices(
        layers=layers,
        costs=BitCosts(cells=cells, unit="ms", reference=1.0, of_what="all"),
        budget=budget,
        fixed=fixed_bits(n, activations=cells.shape[2] > 1, keep_ends=keep_ends),
        min_bit=min_bit,
        max_bit=max_bit,
    )


def test_cases_are_all_free_operands_at_all_bits():
    choices = choices_of_table(np.ones((3, 8, 8)), 9.0, keep_ends=True, min_bit=3, max_bit=5)
    assert cases_of(choices) == [None, *(Case(1, operand, bits) for operand in (0, 1) for bits in (3, 4, 5))]
    choices = choices_of_table(np.ones((2, 8, 8)), 9.0, keep_ends=False, min_bit=8)
    assert cases_of(choices) == [None, Case(0, 0, 8), Case(1, 0, 8), Case(1, 1, 8)]  # the image is not chosen
    choices = choices_of_table(np.ones((2, 8, 1)), 9.0, keep_ends=False, min_bit=1, max_bit=1)
    assert cases_of(choices) == [None, Case(0, 0, 1), Case(1, 0, 1)]


def test_increases_by_hand():
    choices = choices_of_table(np.ones((3, 8, 8)), 9.0, keep_ends=True, min_bit=4, max_bit=5)
    cases = cases_of(choices)
    found = Sensitivities.of(choices, cases, np.array([1.0, 1.5, 1.25, 3.0, 0.75]))
    assert found.float_loss == 1.0
    assert found.increases[1, 0, 3:5].tolist() == [0.5, 0.25]
    assert found.increases[1, 1, 3:5].tolist() == [2.0, -0.25]
    assert found.of_pairs()[1, 3:5, 3:5].tolist() == [[2.5, 0.25], [2.25, 0.0]]
    assert found.total(np.array([[8, 8], [5, 4], [8, 8]])) == 2.25  # the ends count nothing
    assert found.records(cases, "xyz")[1] == {"layer": "y", "operand": "weights", "bits": 5, "increase": 0.25}


@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_the_bits_are_the_best_of_all_within_the_budget(seed, activations, keep_ends):
    """Four layers at 2 to 4 bits, with random costs, which need not rise with the bits, and random losses."""
    rng = np.random.default_rng(seed)
    cells = rng.random((4, 8, 8 if activations else 1))
    choices = choices_of_table(cells, np.inf, keep_ends=keep_ends, max_bit=4)
    cheapest, most = choices.costs.total(choices.cheapest()), choices.most()
    budget = cheapest + rng.random() * (most - cheapest)
    choices = choices_of_table(cells, budget, keep_ends=keep_ends, max_bit=4)
    cases = cases_of(choices)
    sensitivities = Sensitivities.of(choices, cases, rng.normal(size=len(cases)))
    found = chosen_bits(choices, sensitivities)
    assert choices.costs.total(found) <= budget
    rows = [[(w, a) for w, a in np.argwhere(np.isfinite(layer)).tolist()] for layer in choices.allowed_cells()]
    pairs, best = sensitivities.of_pairs(), np.inf
    for candidate in itertools.product(*rows):
        at = np.arange(4), *np.array(candidate).T
        if cells[at].sum() <= budget:
            best = min(best, pairs[at].sum())
    assert sensitivities.total(found) == pytest.approx(best, abs=1e-9)
    fixed = choices.fixed
    assert (found[fixed != FREE] == 8).all()
    assert ((found[fixed == FREE] >= 2) & (found[fixed == FREE] <= 4)).all()


def test_measurements_continue(few, tmp_path, monkeypatch):
    """Each loss is measured once over two runs, the first of which is killed. Lines of others are refused."""
    measurement, session = measurement_of(few)
    choices = SimpleNamespace(fixed=np.array([[8, 8], [FREE, 8], [8, FREE]]), min_bit=2, max_bit=3)
    cases, made_by = cases_of(choices), {"sensitivity": {"loss_images": 100}}
    journal = Journal(tmp_path / "sensitivity.state.json", "sensitivity.state", "search", "give --overwrite")
    store = LossStore(journal=journal, cases=cases, names=NAMES, made_by=made_by)
    lenient = replace(store, lenient=True)
    store.begin()
    own, measured = LossMeasurement.loss, []

    def counted(self, case):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(case)
        return own(self, case)

    monkeypatch.setattr(LossMeasurement, "loss", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_losses(measurement, cases, session, store)
    monkeypatch.setattr(LossMeasurement, "loss", own)
    assert [*store.load()] == [0, 1, 2]
    lenient.begin()  # --overwrite continues the same work
    found = measure_losses(measurement, cases, session, store)
    assert (
        found.tolist()
        == [own(measurement, case) for case in cases]
        == measure_losses(measurement, cases, session).tolist()
    )
    assert len(journal.files()[0].read_text().splitlines()) == len(cases) == 5

    with pytest.raises(UserError, match=r"sensitivity.loss_images was 100, is 9; give --overwrite"):
        replace(store, made_by={"sensitivity": {"loss_images": 9}}).begin()
    for wrong in ({"index": 1, "loss": 1.0}, {"index": 99}, [], {"index": 0, "layer": None, "loss": "x"}):
        append_jsonl(tmp_path / "sensitivity.state.jsonl", wrong)
        with pytest.raises(UserError, match=r"line \d: not a loss of this search; give --overwrite"):
            store.begin()
        lenient.begin()
        assert store.load() == {}


def test_a_loss_needs_images():
    with pytest.raises(UserError, match="at least two images, not 1"):
        SensitivitySearch(bits=None, train=None, loss_images=1)
