"""Fixtures of all tests. The environment variable APQ_GOLDEN names the folder of golden values."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from apq.presets import DIGITS
from dataset import load_splits
from dataset.splits import Splits, TensorImages

ROOT = Path(__file__).resolve().parent.parent
hypothesis.settings.register_profile("apq", deadline=None)  # tests assert no times
hypothesis.settings.load_profile("apq")
GOLDEN = Path(os.environ.get("APQ_GOLDEN", ROOT.parent / "shared" / "golden"))


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
    """Tests never read or write the user's cache."""
    monkeypatch.setenv("APQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def few():
    """A few real digits, so few that tests are fast."""
    full = load_splits(DIGITS)

    def cut(part, n):
        return TensorImages(part.images[:n], part.labels[:n], part.augment)

    parts = cut(full.train, 128), cut(full.calibration, 128), cut(full.val, 100), cut(full.test, 50)
    return Splits(*parts, source={"dataset": "few digits"})
