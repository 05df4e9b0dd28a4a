"""How QFA trains: ranges and steps for each kernel size, gradients over whole filters, resolutions, clipping."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apq.errors import UserError
from apq.presets import OQA_MBV3, OQA_MBV3_GLYPHS, QFA_MBV3, QFA_MBV3_GLYPHS
from apq.space import space_from_dict, space_to_dict
from dataset.splits import TensorImages, make_loader
from elastic_nn.modules.batch_dropout import BatchDropout
from elastic_nn.modules.elastic_conv import ElasticConv2d
from elastic_nn.modules.elastic_norm import ElasticBatchNorm2d
from elastic_nn.networks import DynamicProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet, supernet_blocks
from elastic_nn.quantizers import BATCHQUANT, FLOAT, LSQ, MIXED, SCHEMES, PerKernel, batchquant
from elastic_nn.training.engine import Training, learning_rate, train_one_epoch
from elastic_nn.training.optimizer import make_optimizer
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.session import Execution
from elastic_nn.training.supernet_training import usual_scheme

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=1, lr=0.1, batch_size=8)


def depthwise(scheme):
    torch.manual_seed(0)
    conv = ElasticConv2d(6, 6, (3, 5, 7), 1, scheme, depthwise=True).double()
    with torch.no_grad():
        for matrix in conv.kernel_transforms.values():
            matrix.add_(0.1 * torch.randn_like(matrix))
    return conv


@torch.no_grad()
def test_a_depthwise_layer_has_quantizers_for_each_kernel_size():
    conv = depthwise(BATCHQUANT)
    x = {kernel: torch.randn(4, 6, 9, 9).double() * kernel for kernel in (3, 5, 7)}
    for kernel in (3, 5, 7):
        conv.set_kernel(kernel)
        conv.set_bits(2, 3)
        conv.weight_quant.calibrate(conv.active_weight(6))
        conv.act_quant.calibrate(x[kernel])
    for kernel in (3, 5, 7):
        conv.set_kernel(kernel)
        w = conv.active_weight(6)
        assert w.shape == (6, 1, kernel, kernel)
        step = conv.weight_quant.scale_and_zero_point()[0].item()
        assert step == pytest.approx(2 * w.abs().mean().item())  # 2 mean|w| / sqrt(highest code), which is 1 at 2 bits
        part = conv.act_quant.at_kernel().of_bits["3"]
        assert part.high.item() == pytest.approx(x[kernel].amax((0, 2, 3)).mean().item())
    assert isinstance(conv.act_quant, PerKernel)
    keys = {key for key in conv.state_dict() if key.endswith("of_bits.2.step")}
    assert keys == {f"weight_quant.of_kernel.{kernel}.of_bits.2.step" for kernel in (3, 5, 7)}


def test_oqas_depthwise_layers_have_one_step_for_all_kernel_sizes():
    conv = depthwise(LSQ)
    assert {key for key in conv.state_dict() if "_quant" in key} == {"weight_quant.step", "act_quant.step"}


@pytest.mark.parametrize(("scheme", "counted"), [(BATCHQUANT, 6 * 25), (LSQ, 4 * 25)])
def test_the_gradient_of_a_step_counts_the_whole_filter_in_qfa(scheme, counted):
    """By hand: sum over the channels in use of grad (round(u) - u, or the code outside), over sqrt(count x highest)."""
    conv = depthwise(scheme)
    conv.set_kernel(5)
    conv.set_bits(3, 3)
    conv.weight_quant.calibrate(conv.active_weight(6))
    x = torch.randn(2, 4, 9, 9).double()  # four of six channels
    conv.train()(x).square().sum().backward()
    quantizer = conv.weight_quant.at_kernel()
    part = quantizer.of_bits["3"] if scheme is BATCHQUANT else quantizer
    w, step = conv.active_weight(4).detach(), part.step.item()
    u = w / step
    codes = u.clamp(-4, 3).round().requires_grad_()
    conv.act_quant.eval() if scheme is LSQ else None
    with torch.no_grad():
        inputs = conv.act_quant(x)
    out = F.conv2d(inputs, codes * step, None, 1, 2, groups=4)
    (grad,) = torch.autograd.grad(out.square().sum(), codes)
    grad = grad / step  # of the quantized weights
    slope = torch.where((u > -4) & (u < 3), codes - u, codes)
    expected = (grad * slope).sum().item() / np.sqrt(counted * 3)
    assert part.step.grad.item() == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_ranges_over_groups_and_over_the_whole_batch():
    torch.manual_seed(0)
    x = torch.randn(256, 5, 4, 4)
    found = {}
    for name in ("batchquant", "batchquant-published"):
        quantizer = SCHEMES[name].activation(True)
        quantizer.bits = 4
        quantizer.calibrate(x)
        found[name] = quantizer.of_bits["4"].high.item()
    groups = torch.stack([part.amax((0, 2, 3)) for part in x.split(64)]).mean().item()
    assert found["batchquant"] == pytest.approx(groups)
    assert found["batchquant-published"] == pytest.approx(x.amax((0, 2, 3)).mean().item())
    assert usual_scheme(QFA_MBV3).name == "batchquant-published"
    assert usual_scheme(QFA_MBV3_GLYPHS).name == "batchquant"


class Watched(nn.Module):
    """Notes the sides of its inputs."""

    def __init__(self):
        super().__init__()
        self.scale, self.sides = nn.Parameter(torch.ones(3)), []

    def forward(self, x):
        self.sides.append(x.size(-1))
        return x.mean((1, 2, 3))[:, None] * self.scale


@pytest.mark.parametrize("follows", [False, True])
def test_every_subnet_of_a_step_gets_its_resolution(follows):
    torch.manual_seed(0)
    net, teacher = Watched(), Watched()
    images = TensorImages(torch.rand(16, 1, 32, 32), torch.randint(3, (16,)))
    training = Training(net, CONFIG, CPU, teacher=teacher, teacher_follows=follows)
    sides = (32, 16, 24, 16)
    train_one_epoch(training, make_loader(images, 8, shuffle=True), 0, lambda: [partial(int, s) for s in sides])
    assert net.sides == list(sides) * 2  # two steps
    assert teacher.sides == ([32, 16, 24] if follows else [32]) * 2  # each resolution once a step


def test_resized_images_are_those_of_the_loader():
    """A subnet at 24 pixels learns from the antialiased images that a loader of 24 pixels gives."""
    seen = []

    class Net(Watched):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    images = TensorImages(torch.rand(8, 1, 32, 32), torch.randint(3, (8,)))
    train_one_epoch(Training(Net(), CONFIG, CPU), make_loader(images, 8), 0, lambda: [partial(int, 24)])
    expected = F.interpolate(images.images, (24, 24), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(seen[0], expected)


def test_gradients_are_clipped_together_or_apart():
    net = nn.Sequential(ElasticConv2d(2, 2, (1,), 1, LSQ), nn.Flatten(), nn.Linear(2, 2))
    found = {}
    for together in (False, True):
        for i, parameter in enumerate(net.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + i)
        whole = [parameter.grad.clone() for parameter in net.parameters()]
        make_optimizer(net, CONFIG).clip_gradients(0.5, together=together)
        found[together] = [parameter.grad for parameter in net.parameters()]
    norm = torch.cat([grad.flatten() for grad in whole]).norm()
    for grad, clipped in zip(whole, found[True], strict=True):
        torch.testing.assert_close(clipped, grad * 0.5 / norm, rtol=1e-5, atol=0)
    steps = torch.cat([p.grad for p in (net[0].weight_quant.step, net[0].act_quant.step)])
    assert steps.norm() < 0.5 / 1.1  # together they share the norm with all else
    apart = dict(zip((name for name, _ in net.named_parameters()), found[False], strict=True))
    assert torch.cat([apart["0.weight_quant.step"], apart["0.act_quant.step"]]).norm().item() == pytest.approx(0.5)


def test_warm_up_starts_at_its_own_rate():
    config = TrainConfig(epochs=65, lr=0.08, warmup_epochs=5, warmup_lr=2.5e-3)
    assert learning_rate(config, 0) == pytest.approx(2.5e-3, rel=0.02)
    assert learning_rate(config, 2.5) == pytest.approx((0.08 + 2.5e-3) / 2, rel=1e-3)
    assert learning_rate(config, 5) == 0.08
    with pytest.raises(UserError, match="warm-up from 0 to the learning rate"):
        replace(config, warmup_lr=0.1)


def test_dropout_of_a_recipe_is_that_of_the_network():
    net = DynamicProxylessNASNets(space=OQA_MBV3_GLYPHS)
    Training(net, replace(CONFIG, dropout=0.1), CPU)
    assert net.dropout.p == 0.1
    Training(net, CONFIG, CPU)
    assert net.dropout.p == 0
    with pytest.raises(UserError, match="dropout must be"):
        replace(CONFIG, dropout=1.0)


def test_mobilenet_v3_spaces_have_their_shortcut_and_epsilon():
    with torch.device("meta"):
        for space in (OQA_MBV3, OQA_MBV3_GLYPHS, QFA_MBV3, QFA_MBV3_GLYPHS):
            net = MBConvNet(space, supernet_blocks(space), FLOAT)
            assert {norm.eps for norm in net.modules() if isinstance(norm, ElasticBatchNorm2d)} == {1e-5}
            assert net.blocks[0].shortcut
            assert space_from_dict(space_to_dict(space)) == space
    data = space_to_dict(OQA_MBV3)
    older = {key: value for key, value in data.items() if key not in ("norm_eps", "first_shortcut")}
    assert (space_from_dict(older).norm_eps, space_from_dict(older).first_shortcut) == (1e-3, False)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"first_shortcut": True, "first_block_width": 24}, "has a shortcut, but 16 channels before it and 24"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"norm_eps": "1e-5"}, "norm_eps must be above 0"),
        ({"first_shortcut": 1}, "first_shortcut must be true or false"),
        ({"classifier_bits": 0}, "at least 1"),
    ],
)
def test_spaces_that_make_no_network_are_refused(changes, match):
    with pytest.raises(UserError, match=match):
        replace(OQA_MBV3, **changes)


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, x = BatchDropout(0.1), torch.ones(400, 50)
    y = dropout(x)
    assert set(y.unique().tolist()) == {0.0, (torch.ones(()) / 0.9).item()}
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert dropout.eval()(x) is x


def test_processes_drop_what_one_process_does(monkeypatch):
    """Three processes have 4, 4 and 3 of 11 images; afterwards their generators are where that of one process is."""
    x, parts, after = torch.rand(11, 6), {}, set()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.fill_(11))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank in (None, 0, 1, 2):
        torch.manual_seed(1)
        dropout = BatchDropout(0.5)
        dropout.synchronised = rank is not None
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts[rank] = dropout(x if rank is None else x[rank::3])
        after.add(torch.rand(1).item())
    for rank in (0, 1, 2):
        assert torch.equal(parts[rank], parts[None][rank::3])
    assert len(after) == 1


@pytest.mark.parametrize("name", SCHEMES)
def test_the_number_of_processes_is_recorded_where_it_matters(name):
    one, two = (Execution(world_size=n).record(per_process=SCHEMES[name].per_process) for n in (1, 2))
    assert (one != two) == SCHEMES[name].per_process


@pytest.mark.parametrize("name", [name for name, scheme in MIXED.items() if name != "lsq-per-bits"])
def test_ranges_depend_on_processes_where_the_scheme_says_so(name, monkeypatch):
    """Each of two processes has every second of 8 images. Only some estimates are those of one process with all."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6)
    low, high = x.flatten(2).aminmax(dim=2)  # all below and above 0
    monkeypatch.setattr(batchquant, "rows_of_all", lambda own: low if own.mean() < 0 else high)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda edges: edges.mul_(2))  # as if both had this one's
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    found = []
    for images in (x, x[::2], x[1::2]):
        quantizer = MIXED[name].activation(True).of_bits["4"]
        quantizer.synchronised = images is not x
        quantizer.calibrate(images)
        found.append(quantizer.high.item())
    assert (found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)) != MIXED[name].per_process
