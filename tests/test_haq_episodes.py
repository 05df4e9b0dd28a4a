"""HAQ's recipes, the rewards of its episodes, and pruned networks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apq.errors import UserError
from apq.model import ModelSpec
from apq.policy import layer_names, policy_from_strategy
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.named_models import build_model, named_model
from elastic_nn.quantizers import KMeansWeightQuantizer
from elastic_nn.quantizers.kmeans import fit_nonzero
from elastic_nn.training.engine import evaluate, learning_rate, seed_epoch
from elastic_nn.training.finetune import finetune
from elastic_nn.training.haq_recipes import haq_recipe_of
from elastic_nn.training.optimizer import make_optimizer
from elastic_nn.training.policies import PolicyScorer, ShortFinetune, quantized_model
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES, get_recipe
from elastic_nn.training.session import Session
from elastic_nn.training.tally import Hits, Tally
from lut.bitfusion import BitFusion
from lut.traced import traced_layers
from methods.ddpg.command import build_parser
from methods.ddpg.search import agent_bits
from methods.search.bit_search import make_task, search_bits
from methods.search.policy_flags import episode_finetune
from methods.search.settings import AgentConfig, BitSearch, PolicySearch

CPU = torch.device("cpu")
SMALL = named_model("mobilenet_v1_small", "digits")
SHORT = TrainConfig(epochs=1, lr=0.01, batch_size=32, schedule="constant", nesterov=False, label_smoothing=0.0)
HOW = ShortFinetune(train=SHORT, side=32, train_images=64, val_images=50)


@pytest.mark.parametrize(
    ("quantizer", "name"),
    [("kmeans", "haq-imagenet-kmeans"), ("linear", "haq-imagenet-linear"), ("linear-published", "haq-imagenet-linear")],
)
def test_the_recipe_of_a_quantizer(quantizer, name):
    assert haq_recipe_of(named_model("resnet50"), quantizer) == name


def test_other_networks_keep_their_recipes():
    assert haq_recipe_of(SMALL, "linear") is None
    digits = get_recipe(None, SMALL)
    assert (digits.reward, digits.episode) == ("validation", replace(digits.pair_finetune, epochs=1))


def test_schedules():
    config = TrainConfig(epochs=4, lr=0.8, schedule="exponential", gamma=0.5)
    assert [learning_rate(config, e) for e in (0, 0.9, 1, 2.5, 3)] == pytest.approx([0.8, 0.8, 0.4, 0.2, 0.1])
    constant = replace(config, schedule="constant", warmup_epochs=1)
    assert [learning_rate(constant, e) for e in (1, 2.5, 3.9)] == [0.8] * 3
    late = replace(config, warmup_epochs=1)
    assert learning_rate(late, 2) == pytest.approx(0.4)
    assert learning_rate(late, 0.5) == pytest.approx(0.4, abs=1e-3)
    for wrong in ({"schedule": "step"}, {"gamma": 0.0}, {"gamma": 1.5}):
        with pytest.raises(UserError, match="schedule must be one of cosine, constant, exponential"):
            replace(config, **wrong)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_by_hand(nesterov):
    """Two steps of gradient 1 from 0, with rate 1 and momentum 0.5: 1 + 1.5, or by Nesterov 1.5 + 1.75."""
    net = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(net.weight)
    optimizer = make_optimizer(net, TrainConfig(epochs=1, lr=1.0, momentum=0.5, weight_decay=0.0, nesterov=nesterov))
    for _ in range(2):
        net.weight.grad, net.bias.grad = torch.ones(2, 2), torch.zeros(2)
        optimizer.step()
    assert net.weight[0, 0].item() == pytest.approx(-3.25 if nesterov else -2.5)


def test_tally():
    tally, logits = Tally(CPU), torch.arange(7.0).repeat(4, 1)  # the order of the classes is 6, 5, ...
    tally.add(logits, torch.tensor([6, 5, 2, 1]))
    tally.add(logits[:1], torch.tensor([6]))
    assert tally.total(Session(splits=None, device=CPU).execution) == ((2 / 5, 4 / 5), 5)


def scorer_of(few, seed=0, quantizer="linear", **changes):
    torch.manual_seed(0)
    net = build_model(SMALL)
    layers = traced_layers(net, 32, in_channels=1)
    first, rest = ([8, -1], [8, 8]) if quantizer == "linear" else (4, 4)
    policy = policy_from_strategy(quantizer, layers, [first, *[rest] * (len(layer_names(layers)) - 1)])
    session = Session(splits=few, device=CPU, seed=seed)
    return PolicyScorer(net, layer_names(layers), quantizer, replace(HOW, **changes), session), policy


def test_training_reward_is_the_accuracy_within_the_epoch(few):
    """With a learning rate of next to nothing it is the accuracy of the calibrated network on the same images, in
    training mode; and the original is that of the float network on the same images."""
    still = replace(SHORT, lr=1e-30, weight_decay=0.0)
    scorer, policy = scorer_of(few, reward="training", train=still)
    session, net = scorer.session, scorer.net
    found = scorer.accuracy(policy)
    seed_epoch(session.seed, 0)
    batches = list(session.loader(few.train, 32, shuffle=True, sides=(32,), n_images=64))
    assert sum(len(labels) for _, labels in batches) == 64
    net.train()
    with torch.no_grad():
        hits = [net(images).argsort(dim=1, descending=True)[:, :5] == labels[:, None] for images, labels in batches]
    assert found == (torch.cat(hits)[:, 0].sum() / 64, torch.cat(hits).any(1).sum() / 64)
    torch.manual_seed(0)
    plain = evaluate(build_model(SMALL), batches, CPU)
    assert scorer.original == (plain.top1, plain.top5)

    on_validation, _ = scorer_of(few, train=still)
    torch.manual_seed(0)
    val = session.loader(few.val.thinned(50), 256, sides=(32,))
    assert on_validation.original.top1 == evaluate(build_model(SMALL), val, CPU).top1


def iterations(net):
    """Of k-means, in all layers."""
    return {layer.weight_quant.max_iter for layer in quantized_layers(net).values()}


@pytest.mark.parametrize(("metric", "best"), [("top1", (0.5, 0.6)), ("top5", (0.4, 0.9))])
def test_the_best_epoch_is_rewarded(few, monkeypatch, metric, best):
    scorer, policy = scorer_of(few, quantizer="kmeans", reward="training", metric=metric)
    assert iterations(scorer.net) == {3}  # HAQ, lib/env/quantize_env.py, step()
    within = [Hits(0.3, 0.8), Hits(0.5, 0.6), Hits(0.4, 0.9), Hits(0.1, 0.2)]
    monkeypatch.setattr("elastic_nn.training.policies.train_epochs", lambda *args, **rest: within)
    assert scorer.accuracy(policy) == best


# HAQ, lib/env/quantize_env.py and linear_quantize_env.py: reward() is (acc - org_acc) * 0.1, both in percent.
@pytest.mark.parametrize(("metric", "rewards", "best"), [("top1", (1.2, -0.3, 0.0), 0), ("top5", (0.5, 1.0, -8.0), 1)])
def test_the_reward_is_a_tenth_of_the_gain_in_percent(monkeypatch, metric, rewards, best):
    """Of known accuracies, 0.5 and 0.8 in float: 12 points more, 3 less, none; and 5 more, 10 more, 80 less."""
    scores = (Hits(0.62, 0.85), Hits(0.47, 0.9), Hits(0.5, 0.0))
    given = iter(scores)
    scorer = SimpleNamespace(original=Hits(0.5, 0.8), accuracy=lambda policy: next(given))
    monkeypatch.setattr("methods.search.bit_search.make_scorer", lambda *args: scorer)
    spec = ModelSpec(name="mine", dataset="digits", in_channels=1, n_classes=10, resolution=32)
    task = make_task(build_model(SMALL), spec, "kmeans", "size", BitFusion())
    sizes = {"quantity": "size", "ratio": 0.5, "min_bit": 1, "max_bit": 8, "train_images": 64, "val_images": 50}
    bits = BitSearch(quantizer="kmeans", keep_ends=False, metric=metric, **sizes)
    search = PolicySearch(bits=bits, agent=AgentConfig(episodes=3), train=SHORT)
    found = search_bits(task, search, Session(splits=None, device=CPU))
    history = found.history
    assert [record["reward"] for record in history] == pytest.approx(rewards)
    assert [(record["accuracy"], record["top5"]) for record in history] == list(scores)
    assert (found.episode["episode"], found.original) == (best, 0.5)


def test_flags_change_the_search():
    def settings(*words, recipe="tiny"):
        args = build_parser().parse_args(["--model", "x", *words])
        return agent_bits(args, RECIPES[recipe]), episode_finetune(args, RECIPES[recipe])

    bits, train = settings()
    assert (bits.reward, bits.metric, bits.steps, bits.is_pruned) == ("validation", "top1", "free", False)
    assert train == RECIPES["tiny"].episode
    bits, train = settings("--use_top5", "--steps", "all", "--is_pruned", "--reward", "training")
    assert (bits.reward, bits.metric, bits.steps, bits.is_pruned) == ("training", "top5", "all", True)
    _, train = settings("--finetune_epoch", "3", "--finetune_lr", "0.5", "--finetune_gamma", "0.25")
    assert (train.epochs, train.lr) == (3, 0.5)
    assert [learning_rate(train, epoch) for epoch in range(3)] == pytest.approx([0.5, 0.125, 0.03125])
    bits, train = settings("--finetune_epoch", "2", recipe="haq-imagenet-linear")
    assert (bits.reward, bits.train_images, train.gamma, train.epochs) == ("training", 20_000, 0.8, 2)


@pytest.mark.parametrize("wrong", [{"reward": "test"}, {"metric": "top3"}, {"steps": "some"}])
def test_unknown_values(wrong):
    sizes = {"quantity": "size", "ratio": 0.5, "min_bit": 2, "max_bit": 8, "train_images": 64, "val_images": 50}
    with pytest.raises(UserError, match="must be one of"):
        BitSearch(quantizer="linear", keep_ends=True, **sizes, **wrong)


def pruned_model():
    """A network without its smallest weights: half of those of each layer."""
    torch.manual_seed(0)
    net = build_model(SMALL)
    layers = traced_layers(net, 32, in_channels=1)
    with torch.no_grad():
        for name in layer_names(layers):
            weight = net.get_submodule(name).weight
            weight[weight.abs() <= weight.abs().flatten().median()] = 0
    return net, layers


def used_weights(net):
    return {name: layer.weight_quant(layer.weight) for name, layer in quantized_layers(net).items()}


@pytest.mark.parametrize("quantizer", ["linear", "kmeans"])
def test_zero_weights_stay_zero(few, quantizer):
    """Through clustering, and through a finetune that moves all others."""
    for pruned in (True, False):
        net, layers = pruned_model()
        names = layer_names(layers)
        zero = {name: net.get_submodule(name).weight == 0 for name in names}
        first, rest = ([8, -1], [8, 8]) if quantizer == "linear" else (3, 3)
        policy = policy_from_strategy(quantizer, layers, [first, *[rest] * (len(names) - 1)])
        quantized_model(net, policy, few, 32, 64, CPU, pruned=pruned)
        assert quantizer != "kmeans" or iterations(net) == {50}  # HAQ, finetune.py
        before = {name: weight.detach().clone() for name, weight in used_weights(net).items()}
        lr = 1.0 if quantizer == "linear" else 0.05  # far enough to round otherwise
        config = replace(SHORT, epochs=2, lr=lr, weight_decay=1e-3)
        finetune(net, Session(splits=few, device=CPU), config, side=32)
        after = used_weights(net)
        weights = {name: net.get_submodule(name).weight for name in names}
        moved = [name for name in names if weights[name][zero[name]].any() or after[name][zero[name]].any()]
        if not pruned:
            assert moved
            continue
        assert not moved
        assert not any(before[name][zero[name]].any() for name in names)
        assert any(not torch.equal(after[name], before[name]) for name in names)
        for name in names if quantizer == "kmeans" else ():
            assert len(before[name][~zero[name]].unique()) == min(8, int((~zero[name]).sum()))


def test_clusters_of_pruned_weights():
    values = np.array([[0, -3, 0], [1, 1.2, 9]], dtype=np.float32)
    labels, centroids = fit_nonzero(values, 1, max_iter=50, seed=0)
    assert sorted(centroids[labels].ravel().tolist()) == pytest.approx(
        sorted([0, 0, -0.8 / 3, -0.8 / 3, -0.8 / 3, 9]), rel=1e-5
    )
    labels, centroids = fit_nonzero(np.zeros((2, 2), dtype=np.float32), 3, max_iter=3, seed=0)
    assert (centroids[labels] == 0).all()
    many = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    many[::2] = 0
    labels, centroids = fit_nonzero(many, 8, max_iter=3, seed=0)
    assert (centroids[labels] == 0).tolist() == (many == 0).tolist()
    assert len(centroids) == 256
    made = KMeansWeightQuantizer()
    made.bits, made.keeps_zeros = 2, True
    made.calibrate(torch.from_numpy(many))
    made.check_state(made.state_dict(), torch.Size([3000]))
    with pytest.raises(UserError, match="do not fit"):  # without a zero there may be four
        made.check_state({**made.state_dict(), "centroids": made.centroids.data + 1}, torch.Size([3000]))


def test_pruned_weights_have_no_size():
    """HAQ counts the weights that are left, in the size and in what it is compared with."""
    net, layers = pruned_model()
    spec = ModelSpec(name="mine", dataset="digits", in_channels=1, n_classes=10, resolution=32)
    left = [int((net.get_submodule(name).weight != 0).sum()) for name in layer_names(layers)]
    bits = np.random.default_rng(0).integers(1, 9, (len(left), 1))
    costs = make_task(net, spec, "kmeans", "size", BitFusion(), is_pruned=True).costs
    assert costs.total(bits) == sum(b * n for b, n in zip(bits[:, 0].tolist(), left, strict=True)) / 8
    assert costs.reference == 4 * sum(left)
    assert make_task(net, spec, "kmeans", "size", BitFusion()).costs.reference > 1.9 * costs.reference
