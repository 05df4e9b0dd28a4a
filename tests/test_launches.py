"""What a training step asks of a GPU: no waiting for its values, few launches."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from example_spaces import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_nn.networks import DynamicQuantizedProxylessNASNets
from elastic_nn.quantizers import BATCHQUANT, LINEAR, LSQ
from elastic_nn.training import engine
from elastic_nn.training import optimizer as optimizers
from elastic_nn.training.engine import Training, train_one_epoch
from elastic_nn.training.inheritance import frozen_largest
from elastic_nn.training.recipe import Phase, TrainConfig
from elastic_nn.training.sampling import draw_subnets
from elastic_nn.training.session import Execution
from elastic_nn.training.tally import Tally

CONFIG = TrainConfig(epochs=1, lr=0.01, dropout=0.1, label_smoothing=0.1, clip_norm=1.0)
PHASE = Phase(name="all", elastic=("ks", "d", "e", "bits"), train=CONFIG, subnets_per_step=3, sandwich=True)
SCHEMES = {"linear": LINEAR, "lsq": LSQ, "batchquant": BATCHQUANT}
READS = "aten._local_scalar_dense.default"  # what .item(), bool() and the like do


class Operations(TorchDispatchMode):
    """Counts the operations that torch carries out."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def steps(scheme, device, *, amp=False):
    """A function that takes two steps of the sandwich rule with a teacher. They were taken before."""
    torch.manual_seed(0)
    net = DynamicQuantizedProxylessNASNets(space=TINY, scheme=SCHEMES[scheme]).to(device)
    net(torch.randn(4, 1, 16, 16, device=device))  # sets the steps, also those that the teacher gets
    teacher = frozen_largest(net, device)
    training = Training(net, CONFIG, device, teacher=teacher.train(), execution=Execution(amp=amp))
    training.tally = Tally(device)
    images, labels = torch.randn(4, 1, 16, 16, device=device), torch.arange(4, device=device)

    def take():
        choose = partial(draw_subnets, net, PHASE, np.random.default_rng(0))  # the same subnets each time
        return train_one_epoch(training, [(images, labels)] * 2, 0, choose)

    take()  # sets the steps of operands that no subnet had before
    take()  # reads that they are set
    return take


@pytest.mark.parametrize("scheme", ["lsq", "batchquant"])
def test_a_training_step_reads_no_value_of_a_tensor(scheme):
    """On a GPU each would wait for all work before it. Linear quantizers do read on a CPU, where it is faster."""
    take = steps(scheme, torch.device("cpu"))
    with Operations() as operations:
        take()
    assert operations.counts[READS] == 0
    with operations:
        torch.ones(1).item()
    assert operations.counts[READS] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("amp", [False, True])
def test_a_training_step_on_a_gpu_waits_for_nothing(scheme, amp, monkeypatch):
    take = steps(scheme, torch.device("cuda", 0), amp=amp)
    monkeypatch.setattr(engine._Steps, "mean_loss", lambda self: 0.0)  # of an epoch, which has to read it
    torch.cuda.set_sync_debug_mode("error")
    try:
        take()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_linear_quantizers_read_no_value_where_it_would_wait():
    """The meta device has no values to read. So has the code that runs on a GPU without fused kernels."""
    net = DynamicQuantizedProxylessNASNets(space=TINY, scheme=LINEAR).to("meta")
    logits = net(torch.empty(4, 1, 16, 16, device="meta"))
    logits.sum().backward()
    assert logits.shape == (4, 10)
    assert all(p.grad is not None for name, p in net.named_parameters() if name.endswith("range"))


def test_ranges_need_no_operations_of_their_own_in_a_step(monkeypatch):
    """However many they are, the optimizer steps them by the same operations, but for views."""
    monkeypatch.setattr(optimizers, "steps_fused", lambda params: bool(params))
    counts = []
    for n in (2, 40):
        ranges = [torch.nn.Parameter(torch.full((1,), 0.5 + i)) for i in range(n)]
        groups = [{"name": name, "params": []} for name in ("decayed", "free")] + [{"name": "ranges", "params": ranges}]
        optimizer = optimizers.ScaleFreeSGD(groups, dict.fromkeys(ranges, 0.1), lr=0.1)
        for _ in range(2):
            for p in ranges:
                p.grad = torch.ones_like(p)
            with Operations() as operations:
                optimizer.clip_gradients(1.0)
                optimizer.step()
        views = ("aten.view", "aten._unsafe_view", "aten.detach", "aten.split", "aten.alias", "aten._reshape_alias")
        counts.append({name: n for name, n in operations.counts.items() if not name.startswith(views)})
    few, many = counts
    assert {name: n for name, n in many.items() if n > few.get(name, 0)} == {}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_sgd_steps_as_the_plain_one(momentum, monkeypatch):
    """Also a parameter that has its first gradient later, as layers that the first subnets do not run."""
    found = []
    for is_fused in (False, True):
        monkeypatch.setattr(optimizers, "steps_fused", lambda params, answer=is_fused: answer)
        torch.manual_seed(0)
        net = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("early", "late")})
        optimizer = optimizers.make_optimizer(net, replace(CONFIG, lr=0.1, momentum=momentum, nesterov=momentum > 0))
        x = torch.randn(5, 3)
        for late in (False, False, True, True, False, True):
            optimizer.zero_grad(set_to_none=True)
            y = net["early"](x)
            (net["late"](y) if late else y).square().sum().backward()
            optimizer.clip_gradients(1.0)
            optimizer.step()
        found.append([p.detach().clone() for p in net.parameters()])
        assert all(group["fused"] is None for group in copy.deepcopy(optimizer.state_dict())["param_groups"])
    for plain, one in zip(*found, strict=True):
        torch.testing.assert_close(one, plain)
