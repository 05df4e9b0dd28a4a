"""The start of a supernet's training: bit inheritance and quantization-aware training, small and exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apq.bit_widths import at_bits, bits_throughout, same_architectures
from apq.errors import UserError
from apq.genes import largest_subnet, smallest_subnet
from apq.presets import DIGITS, OQA_MBV2, OQA_MBV2_GLYPHS, OQA_MBV3_GLYPHS, QFA_MBV3_GLYPHS
from apq.resume import Resume
from dataset.splits import make_loader
from elastic_nn.modules.quant_layers import quantizers
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.networks.subnet_file import load_subnet, save_subnet
from elastic_nn.networks.supernet_file import build_supernet, load_quantized_supernet, load_supernet, save_supernet
from elastic_nn.quantizers import FLOAT, KMEANS, LINEAR, LSQ, MIXED
from elastic_nn.training import progressive_shrinking
from elastic_nn.training.batchnorm import RECALIBRATION_BATCH, recalibrate
from elastic_nn.training.engine import evaluate
from elastic_nn.training.finetune import CALIBRATION_IMAGES, quantized_subnet
from elastic_nn.training.inheritance import check_start, first_supernet, first_teacher
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record, train_supernet
from elastic_nn.training.recipes import RECIPES, get_recipe
from elastic_nn.training.session import ONE_PROCESS, Execution, Session

CPU = torch.device("cpu")
N_IMAGES = 64
SMALL = replace(OQA_MBV3_GLYPHS, name="small-oqa", dataset="digits", n_classes=10, resolutions=(24, 32))
TINY = replace(RECIPES["tiny-sandwich"], recalibration_images=N_IMAGES)
SANDWICH_ONLY = replace(TINY, phases=TINY.phases[1:])


def train(space, few, path, recipe=TINY, scheme=LSQ, start=None, execution=ONE_PROCESS):
    plan = SupernetPlan(space=space, recipe=recipe, scheme=scheme, start=start)
    session = Session(splits=few, device=CPU, execution=execution)
    return train_supernet(plan, session, Resume(path, supernet_record(plan, session), "training"))


@pytest.fixture(scope="module")
def four_bits(few, tmp_path_factory):
    net, records = train(SMALL, few, tmp_path_factory.mktemp("four") / "state")
    return net, records


def test_which_spaces_have_one_bit_width():
    assert bits_throughout(OQA_MBV2) == 4
    assert bits_throughout(at_bits(OQA_MBV2, 2)) == 2
    assert bits_throughout(DIGITS) is None
    assert bits_throughout(at_bits(DIGITS, 4)) is None  # its ends have 8
    assert same_architectures(OQA_MBV2, at_bits(OQA_MBV2, 2))
    assert not same_architectures(OQA_MBV2, replace(OQA_MBV2, head_width=640))
    assert not same_architectures(OQA_MBV2_GLYPHS, OQA_MBV3_GLYPHS)


def test_all_steps_are_started_before_the_first_image_is_trained_on(few):
    net = first_supernet(SMALL, LSQ, None, few, N_IMAGES, CPU)
    assert len(quantizers(net)) > 40
    assert all(part.step.item() > 0 for part in quantizers(net))
    assert quantizers(first_supernet(SMALL, FLOAT, None, few, N_IMAGES, CPU)) == []


@pytest.mark.parametrize("kernel", [3, 7])
def test_ranges_of_each_kernel_size_are_those_of_its_own_network(few, kernel):
    """Under the norms of the largest kernels, activations of the smallest grow from block to block, by hundreds."""
    space = replace(QFA_MBV3_GLYPHS, name="small-qfa", dataset="digits", n_classes=10, resolutions=(24,))
    torch.manual_seed(0)
    start = build_supernet(space, FLOAT)
    net = first_supernet(space, MIXED["lsq-per-bits"], start, few, N_IMAGES, CPU)
    largest = largest_subnet(space)
    start.activate(replace(largest, ks=(kernel,) * len(largest.ks)))
    alone = start.get_active_subnet()
    recalibrate(alone, make_loader(few.calibration, RECALIBRATION_BATCH, sides=(24,)), CPU, N_IMAGES)
    layers = {name: layer for name, layer in alone.named_modules() if name.endswith("depthwise.conv")}
    found = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda layer, args, name=name: found.__setitem__(name, args[0].abs().mean()))
    with torch.no_grad():
        alone.eval()(next(iter(make_loader(few.calibration, CALIBRATION_IMAGES, sides=(24,))))[0])
    for name, mean in list(found.items())[1:]:  # the first block has one kernel size
        quantizer = net.get_submodule(name).act_quant.of_kernel[str(kernel)].of_bits["4"]
        assert quantizer.step.item() == pytest.approx(2 * mean.item() / 15**0.5, rel=1e-3)


def test_fewer_bits_inherit_weights_and_doubled_steps(few, four_bits):
    source = four_bits[0]
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    net = first_supernet(at_bits(SMALL, 2), LSQ, source, few, N_IMAGES, CPU)
    steps = 0
    for key, tensor in net.state_dict().items():
        assert torch.equal(source.state_dict()[key], before[key])
        if "running" in key or "tracked" in key:
            continue
        steps += key.endswith(".step")
        assert torch.equal(tensor, 4 * before[key] if key.endswith(".step") else before[key]), key
    assert steps == len(quantizers(net))
    mean = "feature_mix_layer.norm.running_mean"
    assert not torch.equal(net.state_dict()[mean], before[mean])  # recalibrated at 2 bits
    assert {part.bits for part in quantizers(net)} == {2}


def test_a_float_supernet_hands_down_weights_alone(few, tmp_path):
    source, _ = train(SMALL, few, tmp_path / "float", scheme=FLOAT)
    assert source.scheme == FLOAT
    net = first_supernet(SMALL, LSQ, source, few, N_IMAGES, CPU)
    assert torch.equal(net.blocks[1].expand.conv.weight, source.blocks[1].expand.conv.weight)
    assert all(part.step.item() > 0 for part in quantizers(net))
    _, records = train(SMALL, few, tmp_path / "qat", SANDWICH_ONLY, start=source)
    assert [epoch["epoch"] for epoch in records[0]["epochs"]] == [0, 1]


def test_what_cannot_be_started_from(few, four_bits, tmp_path):
    net = four_bits[0]
    cases = [
        (at_bits(SMALL, 5), LSQ, net, "5 bits cannot inherit from fewer"),
        (OQA_MBV3_GLYPHS, LSQ, net, "has other architectures"),
        (SMALL, FLOAT, net, "float supernet cannot start from a quantized one"),
        (SMALL, LINEAR, None, "not trained with linear"),
        (SMALL, KMEANS, None, "not trained with kmeans"),
        (DIGITS, LSQ, None, "space digits has several"),
        (at_bits(SMALL, 3), LSQ, DynamicQuantizedProxylessNASNets(space=SMALL, scheme=LSQ), "never trained"),
    ]
    for space, scheme, start, message in cases:
        with pytest.raises(UserError, match=message):
            check_start(start, space, scheme)
    with pytest.raises(UserError, match="give a supernet to start from"):
        train(SMALL, few, tmp_path / "s", SANDWICH_ONLY)
    assert not (tmp_path / "s").exists()


def test_a_sandwich_step_trains_the_ends_and_two_others(few, four_bits, tmp_path, monkeypatch):
    """The teacher is the largest subnet of the start, with statistics of its own."""
    active, teachers = [], []
    step = progressive_shrinking.train_one_epoch

    def watched(training, loader, epoch, choose):
        def watched_choose():
            for activate in (calls := choose()):
                activate()
                active.append(training.net.active)
            return calls

        teachers.append(training.teacher)
        return step(training, loader, epoch, watched_choose)

    monkeypatch.setattr(progressive_shrinking, "train_one_epoch", watched)
    space = at_bits(SMALL, 3)
    train(space, few, tmp_path / "s", SANDWICH_ONLY, start=four_bits[0])
    assert len(active) == 4 * 2  # 128 images, 64 a step
    for i in (0, 4):
        assert active[i : i + 2] == [largest_subnet(space), smallest_subnet(space)]
    assert len(set(active)) == 6
    assert {part.bits for part in quantizers(teachers[0])} == {4}
    assert not any(parameter.requires_grad for parameter in teachers[0].parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        images = few.val.images
        assert torch.equal(teachers[0](images), first_teacher(four_bits[0], few, N_IMAGES, CPU)(images))


def test_killed_inheritance_ends_the_same(few, four_bits, tmp_path, monkeypatch):
    """Three epochs at 3 bits, stopped after each and continued, equal three epochs without a stop."""
    space, phase = at_bits(SMALL, 3), SANDWICH_ONLY.phases[0]
    recipe = replace(SANDWICH_ONLY, phases=(replace(phase, train=replace(phase.train, epochs=3)),))
    whole, records = train(space, few, tmp_path / "whole", recipe, start=four_bits[0])
    assert [epoch["epoch"] for epoch in records[0]["epochs"]] == [0, 1, 2, 3]
    save = Resume.save

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "save", save_then_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train(space, few, tmp_path / "killed", recipe, start=four_bits[0])
    again, records_again = train(space, few, tmp_path / "killed", recipe, start=four_bits[0])
    assert records_again == records
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    other = DynamicProxylessNASNets(space=SMALL)
    with pytest.raises(UserError, match="another training: start changed"):
        train(space, few, tmp_path / "killed", recipe, start=other)
    with pytest.raises(UserError, match=r'phases changed; scheme was "lsq", is "float"; start changed'):
        train(space, few, tmp_path / "killed", replace(recipe, phases=TINY.phases), scheme=FLOAT)


def test_an_epoch_of_fewer_images(few, tmp_path, monkeypatch):
    sizes = []
    step = progressive_shrinking.train_one_epoch

    def watched(training, loader, *args):
        sizes.append(sum(len(labels) for _, labels in loader))
        return step(training, loader, *args)

    monkeypatch.setattr(progressive_shrinking, "train_one_epoch", watched)
    first, second = TINY.phases
    recipe = replace(TINY, phases=(first, replace(second, epoch_images=70)))
    train(SMALL, few, tmp_path / "s", recipe, execution=Execution(accumulate=2))
    assert sizes == [128, 70]


def test_a_subnet_keeps_its_learned_steps(few, four_bits):
    net, subnet = four_bits[0], smallest_subnet(SMALL)
    alone = quantized_subnet(net, subnet, few, N_IMAGES, CPU)
    net.activate(subnet)
    for one, own in zip(quantizers(alone), quantizers(net.get_active_subnet()), strict=True):
        assert torch.equal(one.step, own.step)
    batch = few.calibration.images[:N_IMAGES]
    first = alone.first_conv
    with torch.no_grad():
        torch.testing.assert_close(
            first.norm.running_mean,
            first.conv(torch.nn.functional.interpolate(batch, size=24, mode="bilinear", antialias=True)).mean(
                (0, 2, 3)
            ),
            atol=1e-5,
            rtol=1e-4,
        )
    torch.manual_seed(0)
    fresh = quantized_subnet(DynamicQuantizedProxylessNASNets(space=SMALL, scheme=LSQ), subnet, few, N_IMAGES, CPU)
    assert all(part.step.item() > 0 for part in quantizers(fresh))


def test_files_keep_the_quantizers(few, four_bits, tmp_path):
    net = four_bits[0]
    save_supernet(tmp_path / "s.pt", net, "tiny-sandwich", few.source)
    subnet, loader = smallest_subnet(SMALL), make_loader(few.val, 64, sides=(24,))
    for load in (load_supernet, load_quantized_supernet):
        loaded, origin = load(tmp_path / "s.pt")
        assert (loaded.scheme, loaded.space, origin.recipe) == (LSQ, SMALL, "tiny-sandwich")
        one, other = (quantized_subnet(part, subnet, few, N_IMAGES, CPU) for part in (net, loaded))
        assert evaluate(one, loader, CPU) == evaluate(other, loader, CPU)
    save_subnet(tmp_path / "n.pt", SMALL, subnet, one.state_dict(), scheme=LSQ)
    assert evaluate(load_subnet(tmp_path / "n.pt")[0], loader, CPU) == evaluate(one, loader, CPU)
    data = torch.load(tmp_path / "s.pt", weights_only=True)
    torch.save({**data, "scheme": "odd"}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="unknown quantizers 'odd'"):
        load_supernet(tmp_path / "odd.pt")


def test_recipes_of_the_paper():
    four, three, two = (get_recipe(None, at_bits(OQA_MBV2, bits)) for bits in (4, 3, 2))
    assert four is get_recipe(None, OQA_MBV2) is RECIPES["oqa-imagenet"]
    assert [(phase.train.epochs, phase.sandwich, phase.subnets_per_step) for phase in four.phases] == [
        (150, False, 1),
        (200, True, 4),
    ]
    assert [(phase.train.epochs, phase.train.lr) for recipe in (four, three, two) for phase in recipe.phases] == [
        (150, 0.04),
        (200, 0.02),
        (25, 0.0016),
        (120, 0.0256),
    ]
    assert all(phase.own_resolutions for recipe in (four, three, two) for phase in recipe.phases)
    for recipe in (four, three, two):
        assert recipe.recalibration_images == 4096
        assert {phase.train.batch_size for phase in recipe.phases} == {1024}
        settings = [recipe.finetune, *(phase.train for phase in recipe.phases)]
        assert {(train.kd_ratio, train.label_smoothing) for train in settings} == {(1.0, 0.1)}
        assert {(train.momentum, train.weight_decay, train.dropout) for train in settings} == {(0.9, 3e-5, 0.1)}
        assert {(train.warmup_epochs, train.nesterov, train.schedule) for train in settings} == {(0, True, "cosine")}
        assert (recipe.finetune.epochs, recipe.finetune.lr, recipe.finetune.batch_size) == (25, 0.0016, 1024)
    assert get_recipe(None, OQA_MBV3_GLYPHS).name == "oqa-glyphs"
    assert get_recipe(None, at_bits(OQA_MBV2_GLYPHS, 2)).name == "oqa-glyphs-2bit"
    assert get_recipe(None, at_bits(OQA_MBV2_GLYPHS, 6)).name == "oqa-glyphs"
    with pytest.raises(UserError, match="too few"):
        replace(four.phases[1], subnets_per_step=1)
