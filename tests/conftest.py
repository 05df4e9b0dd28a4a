"""Fixtures of all tests. The environment variable APQ_GOLDEN names the folder of golden values."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from few_images import FEW_DIGITS
from preloaded import Preloaded

from apq.presets import DIGITS
from dataset import load_splits
from dataset.splits import Splits, TensorImages
from dataset.table import DATASETS

ROOT = Path(__file__).resolve().parent.parent
# Not searched for doctests: to import what plugins change would change it for all tests.
collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]
# Also in processes that tests start: two of torchrun would need two GPUs. Tests of CUDA name it and are marked `gpu`.
os.environ["APQ_DEVICE"] = "cpu"
hypothesis.settings.register_profile("apq", deadline=None)  # tests assert no times
hypothesis.settings.load_profile("apq")
GOLDEN = Path(os.environ.get("APQ_GOLDEN", ROOT.parent / "shared" / "golden"))


def pytest_runtest_setup(item):
    """Tests marked `gpu` need a CUDA device."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def script(name: str):
    """The `main` of a script at the top of the repository."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="session")
def golden():
    """`golden("name.json")` -> the data of a JSON file, the dict of arrays of an npz, or the Path of any other file."""

    def load(name: str):
        path = GOLDEN / name
        if not path.exists():
            pytest.skip(f"golden values not found: {path} (set APQ_GOLDEN)")
        if path.suffix == ".json":
            data = json.loads(path.read_text())
            lists = list(data.values()) if isinstance(data, dict) else [data]
            assert all(cases for cases in lists if isinstance(cases, list)), f"{path} has an empty list"
            return data
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return dict(arrays)
        return path

    return load


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Tests never read or write the user's cache. The processes of pytest share theirs, as those of a user do."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    monkeypatch.setenv("APQ_CACHE", str(root / "cache"))


@pytest.fixture(autouse=True)
def _gpu_is_asked_for(request):
    """A test that is not marked `gpu` puts nothing on a GPU. (Torch's optimizers may open it.)"""

    def allocations():
        return torch.cuda.memory_stats().get("allocation.all.allocated", 0)  # none before CUDA is used

    before = allocations()
    yield
    if allocations() != before and not request.node.get_closest_marker("gpu"):
        pytest.fail("this test uses CUDA and is not marked gpu")


@pytest.fixture
def torch_threads():
    """For tests of what sets the number of torch's threads: afterwards it is as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def preloaded():
    """Runs command lines in processes of their own that need not import anything."""
    with Preloaded() as processes:
        yield processes


@pytest.fixture(scope="session")
def preloaded_twin():
    """As `preloaded`, with another seed of Python's hashes: where both find the same, the order of no set matters."""
    with Preloaded() as processes:
        yield processes


@pytest.fixture(scope="session")
def two_processes(preloaded, preloaded_twin):
    """`two_processes(line, cwd)` -> both runs of a line, or of two lines, in the environment that torchrun makes.

    What torchrun itself does, and what comes before torch is imported, is for tests with processes of their own.
    """

    def call(line, cwd, other=None, **env):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
        env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **address}
        first = preloaded.start(line, cwd=cwd, env={**env, "RANK": "0", "LOCAL_RANK": "0"})
        second = preloaded_twin.start(other or line, cwd=cwd, env={**env, "RANK": "1", "LOCAL_RANK": "1"})
        for run in (first, second):
            run.wait()
        return first, second

    return call


@pytest.fixture(scope="module")
def few_digits():
    """In this process the data set of digits has few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", FEW_DIGITS)
        yield


@pytest.fixture(scope="session")
def few():
    """A few real digits, so few that tests are fast."""
    full = load_splits(DIGITS)

    def cut(part, n):
        return TensorImages(part.images[:n], part.labels[:n], part.augment)

    parts = cut(full.train, 128), cut(full.calibration, 128), cut(full.val, 100), cut(full.test, 50)
    return Splits(*parts, source={"dataset": "few digits"})
