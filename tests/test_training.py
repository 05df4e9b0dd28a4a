"""The engine, progressive shrinking, recalibration, recipes: small runs, exact properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from apq.errors import UserError
from apq.genes import smallest_subnet
from apq.presets import APQ_IMAGENET, DIGITS, GLYPHS
from apq.resume import Resume
from dataset.splits import TensorImages, make_loader
from elastic_nn.modules.mbconv import ElasticMBConv
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.quantizers import LINEAR, LSQ, LinearActivationQuantizer
from elastic_nn.training import progressive_shrinking, sampling
from elastic_nn.training.batchnorm import recalibrate
from elastic_nn.training.engine import Training, evaluate, learning_rate, train_one_epoch
from elastic_nn.training.optimizer import make_optimizer
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record, train_supernet
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES, get_recipe
from elastic_nn.training.session import Execution, Session

CPU = torch.device("cpu")
TINY = RECIPES["tiny"]
PLAN = SupernetPlan(space=DIGITS, recipe=TINY)


def test_learning_rate_warms_up_then_follows_a_cosine():
    config = TrainConfig(epochs=12, lr=1.0, warmup_epochs=2)
    rates = [learning_rate(config, e) for e in np.linspace(0, 12, 49)]
    assert rates[0] < 0.01
    assert rates[8] == pytest.approx(1.0)
    assert rates[28] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert np.all(np.diff(rates[8:]) <= 0)


@pytest.mark.parametrize("scheme", [LINEAR, LSQ], ids=lambda scheme: scheme.name)
def test_norms_biases_ranges_and_steps_are_not_decayed(scheme):
    net = DynamicQuantizedProxylessNASNets(space=DIGITS, scheme=scheme)
    decayed, free, ranges = make_optimizer(net, TrainConfig(epochs=1, lr=0.1)).param_groups
    assert decayed["weight_decay"] > 0 == free["weight_decay"] == ranges["weight_decay"]
    assert {id(p) for p in ranges["params"]} == {
        id(p) for n, p in net.named_parameters() if n.endswith((".range", ".step"))
    }
    transforms = {id(p) for n, p in net.named_parameters() if "kernel_transforms" in n}
    assert transforms
    assert transforms < {id(p) for p in free["params"]}  # decay would pull them from the identity to nothing
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert sum(len(group["params"]) for group in (decayed, free, ranges)) == len(list(net.parameters()))


def test_ranges_are_clipped_apart(few):
    """A huge gradient of one range does not change the step of the weights, and vice versa."""

    class Net(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.linear, self.quant = nn.Linear(1024, 10), LinearActivationQuantizer(signed=False, published=True)
            nn.init.zeros_(self.linear.weight)
            nn.init.ones_(self.quant.range)
            self.scale = scale

        def forward(self, x):
            return self.linear(x.flatten(1)) + self.scale * self.quant.range * torch.eye(10)[0]

    config = TrainConfig(epochs=1, lr=1.0, batch_size=128, clip_norm=0.5, weight_decay=0.0)
    moved = []
    for scale in (1.0, 1e4):
        net = Net(scale)
        loader = make_loader(TensorImages(few.train.images, few.train.labels), 128)
        train_one_epoch(Training(net, config, CPU), loader, 0)
        moved.append((net.linear.weight.detach().norm().item(), abs(net.quant.range.item() - 1)))
    assert moved[0][0] > 0.1
    assert moved[1][0] > 0.1  # with one norm for both, 1e4 times less would be left
    assert moved[1][1] == pytest.approx(1.9 * 0.5, rel=1e-3)  # Nesterov's first step is 1.9 gradients


def test_evaluate_counts(few):
    class Oracle(nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(self.answers, 10).float().roll(self.shift, 1)

    oracle = Oracle()
    oracle.answers, oracle.shift = few.val.labels, 0
    loader = make_loader(few.val, 100)
    assert evaluate(oracle, loader, CPU).top1 == 1.0
    oracle.shift = 1
    assert evaluate(oracle, loader, CPU).top1 == 0.0
    empty = make_loader(TensorImages(few.val.images[:0], few.val.labels[:0]), 4)
    with pytest.raises(UserError, match="no images"):
        evaluate(oracle, empty, CPU)
    oracle.answers = few.val.labels
    oracle.register_forward_hook(lambda module, args, logits: logits * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        evaluate(oracle, loader, CPU)


def test_recalibration_gives_the_statistics_of_the_data(few):
    net = DynamicProxylessNASNets(space=DIGITS)
    net.activate(smallest_subnet(DIGITS))
    alone = net.get_active_subnet()
    loader = make_loader(few.calibration, 128)
    recalibrate(alone, loader, CPU)
    with torch.no_grad():
        first = alone.first_conv.conv(few.calibration.images)
    norm = alone.first_conv.norm
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, first.var((0, 2, 3)), atol=1e-5, rtol=1e-3)
    assert norm.momentum == 0.1
    recalibrate(alone, make_loader(few.calibration, 120), CPU)  # 120 images and 8: the short batch weighs 8 / 128
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)


def test_diverged_training_is_an_error(few):
    net = DynamicProxylessNASNets(space=DIGITS)
    config = TrainConfig(epochs=1, lr=0.1)
    net.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged"):
        train_one_epoch(Training(net, config, CPU), make_loader(few.train, 64), 0)


def test_later_phases_have_a_teacher_and_sorted_channels(few, monkeypatch):
    """The largest subnet after the first phase is the teacher of all others. Channels are sorted once, for width."""
    calls, sorts = [], []
    train = progressive_shrinking.train_one_epoch

    def watched(training, *args):
        calls.append((training.teacher, len(sorts)))
        return train(training, *args)

    monkeypatch.setattr(progressive_shrinking, "train_one_epoch", watched)
    sort = ElasticMBConv.sort_channels
    monkeypatch.setattr(ElasticMBConv, "sort_channels", lambda block: (sorts.append(1), sort(block)))
    last = TINY.phases[-1]
    recipe = replace(TINY, phases=(*TINY.phases, replace(last, name="width again")))
    train_supernet(SupernetPlan(space=DIGITS, recipe=recipe), Session(splits=few, device=CPU))
    teachers = [teacher for teacher, _ in calls]
    assert teachers[0] is None
    assert all(teacher is teachers[1] and not teacher.training for teacher in teachers[1:])
    n = len(DIGITS.slots)
    assert [done for _, done in calls] == [0, 0, 0, n, n]


def test_distillation_pulls_towards_the_teacher(few):
    """All labels are wrong and the teacher is right: only with the teacher does the network learn the classes."""
    lies = TensorImages(few.train.images, (few.train.labels + 1) % 10)

    class Teacher(nn.Module):
        def forward(self, x):
            return 20 * torch.nn.functional.one_hot(few.train.labels, 10).float()

    agreement = {}
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        net = DynamicProxylessNASNets(space=DIGITS)
        config = TrainConfig(epochs=25, lr=0.05, batch_size=128, kd_ratio=weight)
        training = Training(net, config, CPU, teacher=Teacher())
        for epoch in range(config.epochs):
            train_one_epoch(training, make_loader(lies, 128), epoch)
        net.train()
        agreement[weight] = (net(few.train.images).argmax(1) == few.train.labels).float().mean().item()
    assert agreement[0.0] < 0.2
    assert agreement[10.0] > 0.5


def test_a_step_trains_the_same_subnets_however_its_batch_is_cut(few, monkeypatch):
    drawn = []
    sample = sampling.sample_phase
    monkeypatch.setattr(sampling, "sample_phase", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    found = {}
    for parts in (1, 3):
        drawn.clear()
        train_supernet(PLAN, Session(splits=few, device=CPU, execution=Execution(accumulate=parts)))
        found[parts] = list(drawn)
    assert found[1] == found[3]


def test_accumulated_parts_add_up_to_the_batch(few):
    """Without BatchNorm the gradient of a batch in parts equals that of the whole batch."""
    weights = []
    data = TensorImages(few.train.images.double(), few.train.labels)
    for parts in (1, 5):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).double()
        config = TrainConfig(epochs=1, lr=0.1, batch_size=33)
        training = Training(net, config, CPU, execution=Execution(accumulate=parts))
        train_one_epoch(training, make_loader(data, 33), 0)
        weights.append(net[1].weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)


def test_the_moving_average_is_what_is_scored(few):
    net, records = train_supernet(PLAN, Session(splits=few, device=CPU, execution=Execution(ema=0.9)))
    net.activate(smallest_subnet(DIGITS))
    alone = net.get_active_subnet()
    recalibrate(alone, make_loader(few.calibration, 64), CPU, TINY.recalibration_images)
    assert records[-1]["smallest_top1"] == evaluate(alone, make_loader(few.val, 256), CPU).top1
    plain, _ = train_supernet(PLAN, Session(splits=few, device=CPU))
    assert not torch.equal(plain.classifier.weight, net.classifier.weight)


def test_killed_supernet_training_ends_the_same(few, tmp_path, monkeypatch):
    """A run that is stopped after its third epoch and continued gives the weights of a run without a stop."""

    def train(name, seed=3):
        session = Session(splits=few, device=CPU, seed=seed)
        return train_supernet(PLAN, session, Resume(tmp_path / name, supernet_record(PLAN, session), "training"))

    whole, records = train("whole")
    assert [record["phase"] for record in records] == ["largest", "kernel", "depth", "width"]
    save, count = Resume.save, []

    def save_then_die(*args):
        save(*args)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Resume, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    resumed, resumed_records = train("killed")
    assert resumed_records == records
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    with pytest.raises(UserError, match="another training: seed was 3, is 4"):
        train("killed", seed=4)


def test_recipes():
    assert get_recipe(None, DIGITS) is RECIPES["digits"]
    assert get_recipe(None, GLYPHS) is RECIPES["glyphs"]
    assert get_recipe("tiny", DIGITS) is TINY
    with pytest.raises(UserError, match="digits, glyphs, fashion, apq-imagenet, tiny"):
        get_recipe("huge", DIGITS)
    with pytest.raises(UserError, match="--recipe"):
        get_recipe(None, replace(APQ_IMAGENET, name="mine", recipe=None))
    published = get_recipe(None, APQ_IMAGENET)
    assert [(phase.train.epochs, phase.subnets_per_step) for phase in published.phases] == [
        (180, 1),
        (125, 1),
        (25, 2),
        (125, 2),
        (25, 4),
        (125, 4),
    ]
    assert [phase.train.lr for phase in published.phases] == [2.6, 0.96, 0.08, 0.24, 0.08, 0.24]
    assert {phase.train.batch_size for phase in published.phases} == {2048}
    finetuning = published.finetune
    assert (finetuning.epochs, finetuning.lr, finetuning.batch_size) == (30, 1e-3, 256)
    assert (finetuning.momentum, finetuning.weight_decay, finetuning.label_smoothing) == (0.9, 4e-5, 0.1)
    assert (published.recalibration_images, published.pairs_float, published.pairs_quant) == (2000, 80_000, 5_000)
    with pytest.raises(UserError, match="learning rate"):
        replace(TINY.finetune, lr=-1.0)
