"""Tests of Triton kernels: on a GPU, or on a CPU in Triton's interpreter.

The interpreter must be chosen before Triton is imported. So without a GPU a test of each file runs the others in a
process of its own, in which they are not skipped.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from elastic_nn.quantizers import fused

DEVICE = torch.device("cpu" if fused.INTERPRETED else "cuda")
HAS_TRITON = importlib.util.find_spec("triton") is not None
on_kernels = pytest.mark.gpu if not fused.INTERPRETED else pytest.mark.filterwarnings("ignore:.*in (divide|multiply)")
outside_the_interpreter = pytest.mark.skipif(
    not HAS_TRITON or fused.INTERPRETED, reason="needs Triton, and not to run in its interpreter"
)


def passes_in_the_interpreter(file):
    """Assert that the tests of a file pass in a process in which the interpreter runs the kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", file]
    run = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def assert_learns_alike(net, x, switched):
    """Logits and all gradients of a network are the same with kernels and without, by the context `switched(on)`."""
    found = []
    with torch.no_grad():
        net(x)
    for on in (True, False):
        own = copy.deepcopy(net).train()
        with switched(on):
            logits = own(x)
        logits.square().sum().backward()
        found.append((logits, {name: p.grad for name, p in own.named_parameters() if p.grad is not None}))
    (logits, grads), (logits_ref, grads_ref) = found
    torch.testing.assert_close(logits, logits_ref)
    assert grads.keys() == grads_ref.keys()
    for name, grad in grads_ref.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
