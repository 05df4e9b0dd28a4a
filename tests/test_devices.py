"""Which device a run takes, and equal bits of equal runs. Tests run on the CPU, also where there is a GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from apq.bit_widths import at_bits
from apq.device import resolve_device
from apq.errors import UserError
from apq.exits import MISTAKE, exit_code
from apq.presets import DIGITS
from apq.resume import Resume
from elastic_nn.quantizers import LSQ
from elastic_nn.training.determinism import CUBLAS, deterministic_algorithms
from elastic_nn.training.distributed import joined, processes
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record, train_supernet
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import ONE_PROCESS, Execution, Session

CPU = torch.device("cpu")


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_auto_is_a_gpu_unless_the_environment_says_otherwise(one_gpu, monkeypatch):
    assert os.environ["APQ_DEVICE"] == "cpu"  # of all tests
    assert resolve_device("auto") == CPU
    assert resolve_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("APQ_DEVICE", "cuda")
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="none for process 1"):
        resolve_device("auto")
    monkeypatch.setenv("APQ_DEVICE", "gpu")
    with pytest.raises(UserError, match="APQ_DEVICE is 'gpu', not cpu or cuda"):
        resolve_device("auto")
    for unset in ("", "auto"):
        monkeypatch.setenv("APQ_DEVICE", unset)
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert resolve_device("auto") == torch.device("cuda", 0)


def test_a_gpu_that_the_environment_asks_for_must_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("APQ_DEVICE", "cuda")
    with pytest.raises(
        UserError, match="APQ_DEVICE=cuda: no CUDA device is available; use --device cpu, or unset APQ_DEVICE"
    ):
        resolve_device("auto")
    assert resolve_device("cpu") == CPU


def test_the_flag_lasts_as_long_as_the_work(monkeypatch):
    monkeypatch.delenv(CUBLAS, raising=False)

    def flags():
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic

    for enter in (joined, processes):
        with enter(CPU, Execution(deterministic=True)) as execution:
            assert flags() == (True, True)
            assert execution.deterministic
            assert os.environ[CUBLAS] in (":4096:8", ":16:8")  # the two that torch's manual allows
        assert flags() == (False, False)
        with enter(CPU):
            assert flags() == (False, False)
    with pytest.raises(KeyboardInterrupt), deterministic_algorithms():
        raise KeyboardInterrupt
    assert flags() == (False, False)


def test_unfinished_work_records_the_flag_only_if_it_is_set():
    """So that states of before, which lack it, are still continued."""
    assert ONE_PROCESS.record().keys() == {"amp", "accumulate", "ema"}
    assert Execution(deterministic=True).record()["deterministic"] is True


def test_what_has_no_deterministic_algorithm_is_named_in_a_line(capsys):
    def work(argv):
        with deterministic_algorithms():
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    assert exit_code(work, [], "train.py") == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("train.py: --deterministic: put_ ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", "float"), *(pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in ("float", "amp", "lsq"))],
)
def test_a_killed_training_ends_with_the_same_bits(few, tmp_path, monkeypatch, device, kind):
    """It is stopped in its second phase and continued; every tensor equals that of a run without a stop."""
    recipe = replace(RECIPES["tiny"], phases=RECIPES["tiny"].phases[:: 1 if device == "cuda" else 3])
    plan = SupernetPlan(space=DIGITS, recipe=recipe)
    if kind == "lsq":
        plan = SupernetPlan(space=at_bits(DIGITS, 4), recipe=recipe, scheme=LSQ)

    def train(name):
        with joined(torch.device(device), Execution(amp=kind == "amp", deterministic=True)) as execution:
            session = Session(splits=few, device=torch.device(device), seed=3, execution=execution)
            return train_supernet(plan, session, Resume(tmp_path / name, supernet_record(plan, session), "training"))

    whole, records = train("whole")
    save, count = Resume.save, []

    def save_then_die(*args):
        save(*args)
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Resume, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    resumed, resumed_records = train("killed")
    assert resumed_records == records
    assert next(whole.parameters()).device.type == device
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


@pytest.mark.gpu
def test_all_layers_of_networks_have_deterministic_algorithms():
    """Forward and backward of what networks of spaces and of torchvision's MobileNets are made of."""
    from elastic_nn.networks.named_models import build_model, named_model

    for name in ("mobilenet_v2_small", "mobilenet_v1_small"):
        net = build_model(named_model(name, "digits")).cuda()
        images = torch.randn(8, 1, 32, 32, device="cuda")
        with deterministic_algorithms():
            grads = []
            for _ in range(2):
                net.zero_grad()
                nn.functional.cross_entropy(net(images), torch.arange(8, device="cuda")).backward()
                grads.append([parameter.grad.clone() for parameter in net.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
